"""Keys of a model's metadata that keep nothing from merging: `onnx.compose` refuses two graphs with different values under one key.

So each key has a digest of all the values behind it, and only what is equal meets: "portnorm.graph" becomes "portnorm.graph#5e0f1a2b".
"""

from __future__ import annotations

import hashlib
import json
import re

import onnx
from onnx import helper

from portnorm.errors import CheckpointError

_DIGEST = re.compile("#[0-9a-f]{8}$")


def set_props(proto: onnx.ModelProto, props: dict[str, str]) -> None:
    """Write metadata, each key with the digest."""
    digest = hashlib.sha256(json.dumps(props, sort_keys=True).encode()).hexdigest()[:8]
    helper.set_model_props(proto, {f"{key}#{digest}": value for key, value in props.items()})


def props_of(proto: onnx.ModelProto) -> dict[str, str]:
    """The metadata by key without the digest; raises `CheckpointError` for what was merged of two graphs with the same prefix."""
    found: dict[str, str] = {}
    for entry in proto.metadata_props:
        key = _DIGEST.sub("", entry.key)
        if found.setdefault(key, entry.value) != entry.value:
            raise CheckpointError(
                f"the model was merged of graphs that both have metadata {key!r}; load and verify them before they are merged, or export "
                "each with a `prefix` of its own"
            )
    return found
