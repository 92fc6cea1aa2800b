"""One file per way of sharding a model; each implements the protocol of `base.py`."""
