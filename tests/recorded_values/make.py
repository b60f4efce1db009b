"""Makes original.npz, the part of the recorded values that the tests carry with them.

    python -m tests.recorded_values.make FOLDER

FOLDER holds the recordings of the original code, `golden_<file>.npz`; what their arrays are, and
how inputs and weights are made, tells `tests/recorded.py`. Arrays keep their names,
`<file>/<array>`. Large ones are thinned out (`THINNED`), images are kept as SHA-256 of their bytes,
and gradients as their norms (`gradient_norms/<parameter>`).
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("original.npz")

THINNED = {
    **{f"features/A_C{level}_slice": np.s_[::16, ::3, ::3] for level in (2, 3, 4, 5)},
    **{f"features/A_P{level}_slice": np.s_[::16, ::3, ::3] for level in (2, 3, 4, 6)},
    "features/A_P5": np.s_[::32, ::4, ::4],
    "rpn/A_cls_P5": np.s_[:, ::3, ::3],
    "rpn/A_reg_P5": np.s_[::2, ::5, ::5],
    "rpn/A_cls_P6": np.s_[:, ::2, ::2],
    "rpn/A_reg_P6": np.s_[::2, ::3, ::3],
    "rpn/A_anchors_P6": np.s_[::7],
    "rpn/A_all_scores": np.s_[::20],
    "roi/A_region_embeddings": np.s_[::6, ::16],
    "roi/A_image_embeddings": np.s_[::6, ::8],
    "roi/A_image_1024_slice": np.s_[:, ::16],
    "roi/A_roi_feats_stats": np.s_[::3],
    "roi/A_roi_feats_slice": np.s_[::3, ::8],
    "roi/A_cls_logits_base": np.s_[::4, ::2],
    "roi/A_cls_logits_novel": np.s_[::4],
    "roi/A_image_softmax": np.s_[::4],
    "detections/A_base_scores66": np.s_[::5],
    "detections/A_ft_scores66": np.s_[::5],
    "detections/A_base_dets": np.s_[:40],
    "detections/A_ft_dets": np.s_[:60],
    "detections/A_base_rpnpath_dets": np.s_[:40],
    "train_base/after_step::backbone.conv1.weight": np.s_[::8, :, ::3, ::3],
    "train_base/after_step::rpn_head.rpn_cls.weight": np.s_[:, ::4],
    "train_base/after_step::roi_head.prototype": np.s_[::6, ::32],
    "train_base/after_step::roi_head.bbox_head.fc_reg.weight": np.s_[:, ::16],
}
"""Which part of an array is kept; what is not listed is kept whole."""

UNUSED = ("shipped", "ft_gt", "ft_cat", "per_level", "kd_rois", "kd_emb", "input_shape", "_is_gt")
UNUSED += ("roi_rois", "roi_label", "pos_rows", "roi_bbox", "base/roi_emb", "gap50")
"""No test compares arrays with one of these in their names; the losses depend on all of them."""


def main(folder: Path) -> None:
    kept = {}
    for file in ("preprocess", "features", "rpn", "roi", "detections", "train_base"):
        recorded = np.load(folder / f"golden_{file}.npz")
        for key in recorded.files:
            name, array = f"{file}/{key}", recorded[key]
            if any(part in name for part in (*UNUSED, "grad::")):
                continue
            if key.endswith("_u8"):
                array = np.array(hashlib.sha256(array.tobytes()).hexdigest())
            kept[name] = array[THINNED[name]] if name in THINNED else array
    norms = json.loads((folder / "golden_train_base_gradnorms.json").read_text())
    kept |= {f"gradient_norms/{key}": np.array(norm) for key, norm in norms.items()}
    np.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
