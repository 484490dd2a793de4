"""The study: the papers' methods, their rivals and Espalier's search on the same footing."""
