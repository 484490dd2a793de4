"""Writes what a sweep has found to where other tools show it: TensorBoard, MLflow.

Trackers show; nothing is read back from them. They are written from the store's records when a
stage has ended, each result under a key of its own, so that a sweep that is run again adds what is
missing and nothing twice.
"""
