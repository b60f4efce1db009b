"""Published files and names: addresses, digests, sizes, class names. Data only, no code.

COCO publishes no digests. The SHA-1 digests below come from GluonCV's download script, the sizes
from other public code; neither was checked against the server. OpenAI's address of a CLIP model
contains the file's SHA-256, torchvision's file name its first eight digits; the other digits and
the sizes of weights come from other public code, among them those of the safetensors, which have
OpenAI's weights in float32 under a fixed revision. LP-OVOD's authors publish neither sizes nor
digests: `lpovod.published` remembers those of the first download.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Remote:
    """A public file.

    Attributes:
        url: its address.
        digest: its SHA-1 or SHA-256, hexadecimal, if known; the length shows which.
        size: in bytes, if known.
    """

    url: str
    digest: str | None = None
    size: int | None = None


COCO = {
    "annotations_trainval2017.zip": Remote(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "8551ee4bb5860311e79dace7e79cb91e432e78b3",
        252_907_541,
    ),
    "val2017.zip": Remote(
        "http://images.cocodataset.org/zips/val2017.zip",
        "4950dc9d00dbe1c933ee0170f5797584351d2a41",
        815_585_330,
    ),
    "train2017.zip": Remote(
        "http://images.cocodataset.org/zips/train2017.zip",
        "10ad623668ab00c62c096f0ed636d6aff41faca5",
        19_336_861_798,
    ),
}
"""The archives of COCO 2017 by file name."""

COCO_IMAGES = {"train": 118_287, "val": 5_000}
"""Number of images in each split."""

COCO_CONTENT = {
    "annotations_trainval2017.zip": (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
    ),
    "val2017.zip": ("val2017",),
    "train2017.zip": ("train2017",),
}
"""The members of each archive that are used; an archive whose members exist is not downloaded."""

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush
"""

COCO_CLASSES = tuple(name.strip() for name in _NAMES.split(","))
"""Names of the annotated classes, to check a configuration before the annotations exist."""

_UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_IDS = dict(zip(COCO_CLASSES, (i for i in range(1, 91) if i not in _UNUSED_IDS), strict=True))
"""Their category ids in COCO's files."""

DRIVE = "https://drive.google.com/"
"""Google shows a page before it sends a large file, which `gdown` knows to answer."""

_LP_OVOD = "https://github.com/VinAIResearch/LP-OVOD/releases/download/v1.0"

OPENAI_SAFETENSORS = "ViT-B-32.safetensors"

FILES = {
    "ViT-B-32.pt": Remote(
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        353_976_522,
    ),
    OPENAI_SAFETENSORS: Remote(
        "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/"
        "a6f597a30f7b82c51704746581f9a4e41421e878/open_clip_model.safetensors",
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
        605_143_284,
    ),
    "resnet50-0676ba61.pth": Remote(
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
        102_530_333,
    ),
    "current_mmdetection_Head.pth": Remote(f"{DRIVE}uc?id=1z6Tb2MPFJDv9qpEyn_J0cJcXOguKTiL0"),
    "coco_proposals.pkl": Remote(f"{_LP_OVOD}/coco_proposals.pkl"),
    "proposals.zip": Remote(f"{_LP_OVOD}/proposals.zip"),
    "vild_sigmoid.pth": Remote(f"{_LP_OVOD}/vild_sigmoid.pth"),
    "vild_sigmoid_ft.pth": Remote(f"{_LP_OVOD}/vild_sigmoid_ft.pth"),
    "ovd_coco_text_embedding.pth": Remote(
        "https://raw.githubusercontent.com/VinAIResearch/LP-OVOD/HEAD/ovd_coco_text_embedding.pth"
    ),
}
"""Files by name: OpenAI's CLIP ViT-B/32, in their archive and as safetensors, torchvision's
ResNet-50 (IMAGENET1K_V1), SoCo's ResNet-50, and what LP-OVOD's authors release: OLN's proposals of
COCO, first in one file and now in an archive, the detector before and after fine-tuning, and CLIP's
embeddings of the 65 names. If a configuration names a file with one of these names, in any folder,
and it is missing, it is downloaded."""

MEMBERS = dict.fromkeys(
    (
        "train_coco_proposals.pkl",
        "train_coco_id_map.json",
        "val_coco_proposals.pkl",
        "val_coco_id_map.json",
    ),
    "proposals.zip",
)
"""Files that come in an archive, with the archive's name in `FILES`: downloaded in the same way."""
