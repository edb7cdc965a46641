"""A rollout in the form in which it goes to the learner: an Arrow record batch, which Ray transfers without a copy.

There is one row for each of the points z_0 .. z_K. Each column's `description` says what it holds. The schema's
metadata hold the shapes and the values that are the same for all points.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ml2o_dist.metatrain.episode import Replayable
from ml2o_dist.problems.layout import ParameterLayout
from ml2o_dist.rules.learned import Rollout

_RECORD = "record/"


def rollout_batch(replayable: Replayable) -> pa.RecordBatch:
    """Return the batch: K + 1 rows, 4 P (m (1 + S) + 1) bytes each plus the rule's record. Most data is not copied."""
    rollout = replayable.rollout
    points, instances, objectives, coordinates = rollout.gradients.shape
    columns = {
        "losses": ("losses of the instances' objectives at the point, P * m", rollout.losses),
        "gradients": ("gradients of the chosen coordinates, P * m * S", rollout.gradients),
        "accepted": ("1 where the step from here was the rule's own, P; 0 at z_K", _padded(rollout.accepted)),
        **{
            f"{_RECORD}{name}": (f"what the rule records of the step from here: {name}; 0 at z_K", _padded(tensor))
            for name, tensor in rollout.record.items()
        },
    }
    shared = {
        "instances": instances,
        "objectives": objectives,
        "coordinates": coordinates,
        "record": {name: list(tensor.shape[1:]) for name, tensor in rollout.record.items()},
        "scale": rollout.scale,
        "layout": [(tensor.name, tensor.shape, tensor.kind) for tensor in rollout.layout.tensors],
        "kind": replayable.kind,
        "minima": None if replayable.minima is None else replayable.minima.tolist(),
    }
    fields, arrays = [], []
    for name, (description, tensor) in columns.items():
        flat = tensor.reshape(points, -1).contiguous().cpu().numpy()
        array = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
        fields.append(pa.field(name, array.type, nullable=False, metadata={"description": description}))
        arrays.append(array)
    return pa.record_batch(arrays, schema=pa.schema(fields, metadata={"rollout": json.dumps(shared)}))


def read_rollout(batch: pa.RecordBatch, device: str | torch.device) -> Replayable:
    """Return the batch's content; on a CPU its tensors share the batch's memory, which must not be written to."""
    shared = json.loads(batch.schema.metadata[b"rollout"])
    instances, objectives, coordinates = (shared[name] for name in ("instances", "objectives", "coordinates"))

    def tensor(name: str, points: int, *shape: int) -> Tensor:
        return torch.utils.dlpack.from_dlpack(batch[name].flatten()).to(device).view(batch.num_rows, *shape)[:points]

    steps = batch.num_rows - 1
    losses = tensor("losses", steps + 1, instances, objectives)
    rollout = Rollout(
        losses,
        tensor("gradients", steps + 1, instances, objectives, coordinates),
        {name: tensor(f"{_RECORD}{name}", steps, *shape) for name, shape in shared["record"].items()},
        tensor("accepted", steps, instances),
        shared["scale"],
        ParameterLayout.of(shared["layout"]),
    )
    minima = None if shared["minima"] is None else losses.new_tensor(np.array(shared["minima"]))
    return Replayable(rollout, shared["kind"], minima)


def _padded(steps: Tensor) -> Tensor:
    """Append a row of zeros, since no step starts at the last point."""
    return torch.cat((steps, steps.new_zeros(1, *steps.shape[1:])))
