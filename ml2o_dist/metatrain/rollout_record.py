"""A rollout on its way to the learner: an Arrow record batch, which Ray hands over without a copy.

One row for each of the points z_0 .. z_K; what a column holds stands in its `description`, the shapes and what does not
change from point to point in the schema's metadata.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ml2o_dist.metatrain.episode import Replayable
from ml2o_dist.metatrain.metagradient import Rollout


def rollout_batch(replayable: Replayable) -> pa.RecordBatch:
    """Return the batch: K + 1 rows, 4 P (m (1 + S) + 3) bytes each. Tensors on a CPU are not copied."""
    rollout = replayable.rollout
    points, instances, objectives, coordinates = rollout.gradients.shape
    columns = {
        "losses": ("losses of the instances' objectives at the point, P * m", rollout.losses),
        "gradients": ("gradients of the chosen coordinates, P * m * S", rollout.gradients),
        "agreement": ("agreement of the instances before the step from here, P; 0 at z_K", _padded(rollout.agreement)),
        "total": ("sum of the agreement so far, within the controller's bounds, P; 0 at z_K", _padded(rollout.total)),
        "accepted": ("1 where the step from here was the network's own, P; 0 at z_K", _padded(rollout.accepted)),
    }
    shared = {
        "instances": instances,
        "objectives": objectives,
        "coordinates": coordinates,
        "unit": rollout.unit.tolist(),
        "scale": rollout.scale,
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
    """Return what the batch holds; on a CPU its tensors are the batch's own memory, which must not be written to."""
    shared = json.loads(batch.schema.metadata[b"rollout"])
    instances, objectives, coordinates = (shared[name] for name in ("instances", "objectives", "coordinates"))

    def tensor(name: str, points: int, *shape: int) -> Tensor:
        return torch.utils.dlpack.from_dlpack(batch[name].flatten()).to(device).view(batch.num_rows, *shape)[:points]

    steps = batch.num_rows - 1
    losses = tensor("losses", steps + 1, instances, objectives)
    rollout = Rollout(
        losses,
        tensor("gradients", steps + 1, instances, objectives, coordinates),
        tensor("agreement", steps, instances),
        tensor("total", steps, instances),
        tensor("accepted", steps, instances),
        losses.new_tensor(shared["unit"]),
        shared["scale"],
    )
    minima = None if shared["minima"] is None else losses.new_tensor(np.array(shared["minima"]))
    return Replayable(rollout, shared["kind"], minima)


def _padded(steps: Tensor) -> Tensor:
    """Append a row of zeros: there is no step from the last point."""
    return torch.cat((steps, steps.new_zeros(1, *steps.shape[1:])))
