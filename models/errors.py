"""What can be wrong with a model. Each message says what was found, what was expected and what to do.

ModelError
├── ModelNotFoundError   no folder for a name
├── CheckpointError      a folder whose files are broken, incomplete, or ask for what is not implemented
├── BatchError           token ids that the model cannot take
├── BackendError         a backend's package or device that is not there
├── ExportError          a graph that cannot be made, or differs from its source
├── HubError             a model that cannot be had from the hub, or not now
└── BundleError          a bundle or manifest that is damaged, hostile, or in the way of what is there
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


class BackendError(ModelError):
    """A backend whose package is not installed, or that cannot run on the device; the message has the command."""


class ExportError(ModelError):
    """A graph that cannot be made from this model, or that did not give its source's vectors."""


class HubError(ModelError):
    """A model that the hub does not have, does not give, or gave damaged; or no room for it. The message says which."""


class BundleError(ModelError):
    """A bundle or manifest that cannot be trusted, or a place that is taken; the message names the file."""
