"""The only package that writes artefacts: atomic, hashed, verified before anything is parsed.

An artefact is a directory with a `manifest.json` (or a single file with `<stem>.manifest.json` beside it) that lists
the size and SHA-256 of its files. It is written under a temporary name, flushed, and renamed, so under its own name
it is always complete, whatever was killed or ran full.
"""

from cascade.store.disk import TEMPORARY, check_place, discard, growing, lock, sweep, write_file
from cascade.store.reading import (
    MANIFEST,
    MEASURES,
    Artefact,
    canonical,
    from_json,
    kind_of,
    latest,
    manifest,
    manifest_path,
    member,
    problems,
    read,
)
from cascade.store.tensors import bytes_to_tensors, metadata, refuse_pickle, tensors_to_bytes
from cascade.store.writing import (
    Fill,
    Pairs,
    check_file,
    check_into,
    check_ours,
    check_plain,
    commit,
    commit_file,
    commit_into,
    named,
    prune,
)

__all__ = [
    "MANIFEST",
    "MEASURES",
    "TEMPORARY",
    "Artefact",
    "Fill",
    "Pairs",
    "bytes_to_tensors",
    "canonical",
    "check_file",
    "check_into",
    "check_ours",
    "check_place",
    "check_plain",
    "commit",
    "commit_file",
    "commit_into",
    "discard",
    "from_json",
    "growing",
    "kind_of",
    "latest",
    "lock",
    "manifest",
    "manifest_path",
    "member",
    "metadata",
    "named",
    "problems",
    "prune",
    "read",
    "refuse_pickle",
    "sweep",
    "tensors_to_bytes",
    "write_file",
]
