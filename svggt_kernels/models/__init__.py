"""What is known about each multi-view transformer."""

from .records import RECORDS, ForwardInputs, ModelRecord, find_model, stated_record

__all__ = ["RECORDS", "ForwardInputs", "ModelRecord", "find_model", "stated_record"]
