"""What can be wrong with a model. Each message says what was found, what was expected and what to do.

ModelError
├── ModelNotFoundError   no folder for a name
├── CheckpointError      a folder whose files are broken, incomplete, or ask for what is not implemented
└── BatchError           token ids that the model cannot take
"""

from __future__ import annotations


class ModelError(Exception):
    """Base of all errors about models."""


class ModelNotFoundError(ModelError):
    """No checkpoint was found for a model's name; the message lists the places."""


class CheckpointError(ModelError):
    """A checkpoint's file is missing, malformed or asks for something unsupported; the message names file and field."""


class BatchError(ModelError):
    """Token ids or lengths that do not fit together or do not fit the model."""
