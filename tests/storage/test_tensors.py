from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import DamagedError
from storage.tensors import check_safetensors, load_tensors, save_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.0", min_size=1, max_size=6),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=4,
    )
)
def test_any_tensors_come_back(shapes):
    tensors = {
        name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in shapes.items()
    }
    back = load_tensors(save_tensors(tensors, {"made": "here"}), "memory")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_tensors_may_share_memory_and_be_transposed():
    whole = torch.arange(6.0).reshape(2, 3)
    parts = {"whole": whole, "same": whole, "row": whole[1], "turned": whole.T}
    back = load_tensors(save_tensors(parts), "memory")
    assert all(torch.equal(back[name], tensor) for name, tensor in parts.items())


def test_a_parameter_is_stored_as_its_values():
    back = load_tensors(save_tensors({"w": torch.nn.Parameter(torch.ones(2))}), "memory")
    assert not back["w"].requires_grad


@pytest.fixture
def whole():
    return save_tensors({"w": torch.arange(100.0), "b": torch.zeros(3)})


def cases(whole: bytes) -> dict[str, tuple[bytes, str]]:
    header = json.dumps([1]).encode()
    return {
        "empty": (b"", "only 0 bytes"),
        "in the length": (whole[:5], "only 5 bytes"),
        "in the header": (whole[:40], "cut short inside its header, at 40 bytes"),
        "in the tensors": (whole[:-1], f"{len(whole) - 1} bytes, but its header speaks"),
        "too long": (whole + b"x", f"{len(whole) + 1} bytes, but its header speaks"),
        "foreign": (b"\x89PNG\r\n\x1a\n" + bytes(100), "another kind of file"),
        "foreign header": (struct.pack("<Q", len(header)) + header, "another kind of file"),
    }


@pytest.mark.parametrize("case", cases(b"").keys())
def test_a_damaged_file_is_named_in_one_sentence(whole, tmp_path, case):
    content, words = cases(whole)[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for act, where in (
        (lambda: load_tensors(content, "the library's file"), "the library's file"),
        (lambda: load_tensors(path, "the library's file"), "the library's file"),
        (lambda: check_safetensors(path), str(path)),
    ):
        with pytest.raises(DamagedError) as error:
            act()
        assert str(error.value).startswith(f"{where}: not a whole safetensors file ({words}")
        assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DamagedError, match=r"gone.safetensors: there is no such file"):
        check_safetensors(tmp_path / "gone.safetensors")


def test_a_whole_file_passes(whole, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    check_safetensors(path)
    assert torch.equal(load_tensors(path, "file")["w"], torch.arange(100.0))
