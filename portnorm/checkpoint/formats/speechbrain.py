"""speechbrain: Li-GRU, whose directions share their weights, with the normalizer of its input term."""

from __future__ import annotations

from dataclasses import replace

from portnorm.checkpoint.formats.row import Row, gain_and_shift, rows


def speechbrain_rows() -> list[Row]:
    """Batch or layer normalization; dropout masks are stored and enter nothing in inference."""
    weights = {"weight_ih": rows("w.weight"), "weight_hh": rows("u.weight"), **gain_and_shift("norm_ih", "norm.weight", "norm.bias")}
    statistics = {f"norm_ih.running_{s}": rows(f"norm.running_{s}") for s in ("mean", "var")}
    beside, places = ("drop_masks", "drop_mask_te"), (("rnn.{l}.",), ("",))
    layer = Row("speechbrain", "GRU", weights, "li-gru", "nz", places, unused=beside, first={"h_init": "h0"}, shared=True)
    return [
        replace(layer, reads={**weights, **statistics}, unused=(*beside, "norm.num_batches_tracked")),
        replace(layer, changes={"norm": "layer", "statistics": "step", "variance": "biased"}),
    ]
