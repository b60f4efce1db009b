"""The plan: its arithmetic done again by hand, and what the networks compute by formula."""

import subprocess
import sys
from pathlib import Path

import pytest

from lpovod.apps.plan import costs, plan
from lpovod.config import Config, read_config
from lpovod.exceptions import LpovodError, UsageError
from lpovod.operations import count_operations

COCO = (Path("config.yaml"), Path("configs/coco_learned.yaml"))
MINIATURE = (Path("config.yaml"),)
ROOT = Path.cwd()


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project's folder without results."""
    for name in ("config.yaml", "configs", "resources"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(tmp_path)


def rows(text: str) -> dict[str, list[str]]:
    return {line[:18].strip(): line[18:].split() for line in text.splitlines()}


def overlay(text: str) -> Path:
    Path("mine.yaml").write_text(text)
    return Path("mine.yaml")


def hours(text: str, stage: str) -> float:
    assert "h, 1 GPU" in text
    return float(rows(text)[stage][0])


def test_hours_and_bytes_of_the_paper():
    table = rows(plan(COCO, tflops=10))
    # 123,287 images, 300 regions, two crops of 8.8 GFLOP, of which a GPU cuts 16,600 a second; 1 KB
    # and a box and its objectness
    crops = 123_287 * 300 * 2
    assert float(table["region_embeddings"][0]) == pytest.approx(
        crops * (8.8e9 / 1e13 + 1 / 16_600) / 3600, rel=0.01
    )
    assert float(table["region_embeddings"][3]) == pytest.approx(crops / 2 * 1044 / 1e9, abs=0.1)
    # 20 epochs, three passes; pyramid, RPN, and a head of four convolutions (256 x 256 x 9 weights
    # on 7 x 7 cells) and a linear layer (12,544 x 1,024) on 512 + 300 regions
    head = 2 * (4 * 256 * 256 * 9 * 49 + 12_544 * 1_024)
    needed = 20 * 118_287 * 3 * (232.4e9 + 85.7e9 + 812 * head) / 1e13 / 3600
    assert float(table["base_detector"][0]) == pytest.approx(needed, rel=0.01)
    # GPUs divide a training and the shards, of which COCO has 64.
    assert float(table["base_detector"][1]) == pytest.approx(needed / 8, rel=0.01)
    for stage in ("proposals", "region_embeddings"):
        on_one, on_eight, on_64 = (float(cell.replace("-", "0")) for cell in table[stage][:3])
        assert on_eight == pytest.approx(on_one / 8, abs=0.06)
        assert on_64 == pytest.approx(on_one / 64, abs=0.06)
    assert table["region_index"][0] == table["region_index"][2]
    assert float(table["download"][3]) == pytest.approx(20.4, abs=0.1)


def test_a_stage_takes_no_less_than_its_cores_need_for_its_images():
    """With ever faster GPUs, 123,287 photographs remain to be decoded at 4.6 ms, by three cores."""
    text = plan(COCO, tflops=1e9)
    assert "min, 1 GPU" in text
    assert float(rows(text)["proposals"][0]) == pytest.approx(123_287 * 0.0046 / 3 / 60, abs=0.06)


def test_no_more_gpus_work_than_there_are_shards():
    """Four shards of the training images, four of 51,000 retrieved ones, three of validation."""
    text = plan((*COCO, overlay("shards: 4\npseudo_labels: {k: 3000}")), tflops=0.1)
    table = rows(text)
    on_one, on_eight, on_64 = (float(cell.replace(",", "")) for cell in table["proposals"][:3])
    assert on_eight == on_64 == pytest.approx(on_one / 7, rel=0.01)
    on_one, on_eight = (float(cell.replace(",", "")) for cell in table["region_features"][:2])
    assert on_eight == pytest.approx(on_one / 7, rel=0.01)  # 17 * 3,000 of 118,287 images


@pytest.mark.slow
def test_other_numbers_of_images_can_be_planned():
    few, many = (
        float(rows(text)["region_embeddings"][3])
        for text in (plan(COCO), plan(COCO, images=(2 * 118_287, 10_000)))
    )
    assert many == pytest.approx(2 * few, abs=0.15)  # both are rounded


@pytest.mark.slow
def test_more_proposals_cost_more():
    few, many = (
        hours(plan(files), "region_embeddings")
        for files in (COCO, (*COCO, overlay("proposals: {per_image: 600}")))
    )
    assert many == pytest.approx(2 * few, abs=0.15)  # both are rounded


@pytest.mark.slow
def test_the_configured_clip_is_planned_without_its_weights():
    """ViT-L/14 needs 81.1 GMAC for a crop of 224 pixels, ViT-B/32 4.4; its space has 768 axes."""
    mine = overlay("clip: {architecture: ViT-L-14-quickgelu, weights: nowhere.pt}")
    crops = 123_287 * 300 * 2
    table = rows(plan((*COCO, mine)))
    assert float(table["region_embeddings"][0]) == pytest.approx(
        crops * 2 * 81.1e9 / 2e13 / 3600, rel=0.01
    )
    assert float(table["region_embeddings"][3]) == pytest.approx(
        crops / 2 * (2 * 768 + 20) / 1e9, abs=0.1
    )
    operations = count_operations(read_config((*COCO, mine), weights=False), 224, 224)
    assert operations.crop == pytest.approx(2 * 81.1, rel=0.005)
    assert (operations.crop_size, operations.dimension) == (224, 768)


@pytest.mark.parametrize("clip", ["ViT-B-16-SigLIP", "ViT-Q-99"])
def test_a_clip_that_cannot_be_used_is_named(clip):
    with pytest.raises(LpovodError, match=clip):
        plan((*MINIATURE, overlay(f"clip: {{architecture: {clip}}}")))


def test_attention_pooling_is_counted(tmp_path):
    """A timm tower of SigLIP's kind: 12 layers of width 192 on 196 tokens, 16 x 16 patches."""
    Path("clip.json").write_text(
        '{"embed_dim": 192, "text_cfg": {}, "vision_cfg": {"image_size": 224, "timm_pool": "map",'
        ' "timm_model_name": "vit_tiny_patch16_224", "timm_proj": "none"}}'
    )
    config = read_config((*MINIATURE, overlay("clip: {architecture: clip.json}")), weights=False)
    tokens, width = 196, 192
    layer = tokens * 12 * width**2 + 2 * tokens**2 * width
    pooling = tokens * 2 * width**2 + 2 * width**2 + 2 * tokens * width + 8 * width**2
    expected = tokens * 768 * width + 12 * layer + pooling
    assert count_operations(config, 160, 160).crop == pytest.approx(2 * expected / 1e9, rel=0.02)


def convolution(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """Multiplications, at a square output."""
    return inputs * outputs * kernel**2 * side**2


def pyramid(inputs: list[int], channels: int, sides: list[int]) -> int:
    return sum(
        convolution(n, channels, 1, side) + convolution(channels, channels, 3, side)
        for n, side in zip(inputs, sides, strict=True)
    )


def test_the_small_networks_by_hand():
    operations = count_operations(read_config(MINIATURE), 160, 160)
    # CLIP: a stem at stride 2, then blocks of two convolutions and a 1 x 1 shortcut.
    crop = convolution(3, 24, 3, 24) + 192 * 128
    for inputs, outputs, side in ((24, 48, 12), (48, 96, 6), (96, 192, 3)):
        crop += convolution(inputs, outputs, 3, side) + convolution(outputs, outputs, 3, side)
        crop += convolution(inputs, outputs, 1, side)
    assert operations.crop == pytest.approx(2 * crop / 1e9)
    # The backbone: the same with other widths, on 160 pixels.
    image = convolution(3, 32, 3, 80)
    for inputs, outputs, side in ((32, 48, 40), (48, 96, 20), (96, 160, 10), (160, 224, 5)):
        image += convolution(inputs, outputs, 3, side) + convolution(outputs, outputs, 3, side)
        image += convolution(inputs, outputs, 1, side)
    image += pyramid([48, 96, 160, 224], 64, [40, 20, 10, 5])
    assert operations.pyramid == pytest.approx(2 * image / 1e9)
    # Four distances and an objectness in each cell of five levels.
    cells = 40**2 + 20**2 + 10**2 + 5**2 + 3**2
    proposing = image + cells * (64 * 64 * 9 + 64 * 5)
    assert operations.proposal_network == pytest.approx(2 * proposing / 1e9)
    assert operations.rpn == 0
    # 64 channels on 7 x 7 cells to 512; CLIP's space has 128 axes, a box four.
    head = 64 * 49 * 512
    assert operations.region_head == pytest.approx(2 * head / 1e9)
    assert operations.clip_head == pytest.approx(2 * (head + 512 * 128) / 1e9)
    assert operations.extraction == pytest.approx(2 * (2 * head + 512 * (128 + 4)) / 1e9)


BOTTLENECKS = [256, 512, 1024, 2048]


@pytest.mark.parametrize(
    ("architecture", "channels", "expected"),
    [
        ("resnet50_torchvision", BOTTLENECKS, 4.09),  # torchvision's documentation
        ("resnet50", BOTTLENECKS, 3.8),  # He et al. 2016, table 1
        ("timm:resnet18", [64, 128, 256, 512], 1.81),  # torchvision's documentation
    ],
)
def test_residual_networks_as_published(architecture, channels, expected):
    """GMAC for 224 x 224 pixels, of which the classifier has 0.002."""
    files = (*COCO, overlay(f"backbone: {{architecture: '{architecture}'}}"))
    operations = count_operations(read_config(files, weights=False), 224, 224)
    neck = pyramid(channels, 256, [56, 28, 14, 7])
    assert operations.pyramid / 2 - neck / 1e9 == pytest.approx(expected, rel=0.02)


def test_seconds_of_the_miniature_world():
    table = rows(plan(MINIATURE, gflops=50, cores=2))
    # Three jobs start in 2.2 s; two crops of 50 regions on 1,900 images, which are decoded.
    crop = 0.0286648
    embedding = 3 * 2.2 + 1900 * (100 * crop / 50 + 4.6e-3 * 160 * 160 / (480 * 640))
    assert float(table["region_embeddings"][0]) == pytest.approx(embedding, rel=0.001)
    assert float(table["region_embeddings"][1]) == pytest.approx(
        1900 * 50 * (2 * 128 + 20) / 1e6, abs=0.06
    )
    # One core does a training's work in twice the time of two, and a job of one core in the same.
    alone = rows(plan(MINIATURE, gflops=50, cores=1))
    assert alone["region_embeddings"] == table["region_embeddings"]
    on_two, on_one = float(table["base_detector"][0]), float(alone["base_detector"][0])
    assert on_one - on_two == pytest.approx(on_two, rel=0.1)


def benchmark(place: str, seconds: float, mebibytes: float = 100) -> None:
    path = Path("results", place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:00:01\t{mebibytes}\t1\n")


def test_a_run_is_measured_beside_its_prediction():
    predicted = rows(plan(MINIATURE))["proposals"][0]
    benchmark("mini/benchmarks/proposals/train/0.tsv", 10.25, 800)
    benchmark("mini/benchmarks/proposals/val/0.tsv", 5, 1000)
    table = rows(plan(MINIATURE))
    assert table["proposals"][:2] == [predicted, "15.2"]
    assert float(table["proposals"][2]) == pytest.approx(float(predicted) / 15.25, abs=0.01)
    assert table["proposals"][-1] == "1,048.6"  # MB, where Snakemake has MiB
    assert table["base_detector"][1:3] == table["together"][1:3] == ["-", "-"]
    # Other numbers of images than the run's have nothing to be compared with.
    assert "measured" not in plan(MINIATURE, images=(10, 10))


def test_a_finished_run_has_a_ratio_for_the_whole():
    stages = [row.stage for row in costs(read_config(MINIATURE), 1400, 500)]
    for stage in stages:
        benchmark(f"mini/benchmarks/{stage}.tsv", 40)
    total, measured, ratio = rows(plan(MINIATURE))["together"][:3]
    assert measured == f"{40 * len(stages):.1f}"
    assert float(ratio) == pytest.approx(float(total) / float(measured), abs=0.006)


@pytest.mark.slow
def test_a_run_on_gpus_is_compared_with_its_own_number_of_them():
    on_one = hours(plan(COCO), "base_detector")
    benchmark("coco_learned/benchmarks/base_detector.tsv", 9 * 3600)
    table = rows(plan(COCO))
    assert float(table["base_detector"][0]) == pytest.approx(on_one / 8, abs=0.06)
    assert table["base_detector"][1] == "9.0"


def test_what_is_read_from_files_costs_nothing():
    content = read_config(MINIATURE).model_dump()
    content["proposals"]["files"] = {"val": "a.pkl"}
    content["base_detector"]["checkpoint"] = content["linear_probe"]["checkpoint"] = "b.pth"
    content["evaluation"]["clip_on_crops"] = False
    stages = [row.stage for row in costs(Config.model_validate(content), 1400, 500)]
    assert stages == ["dataset", "text_embeddings", "region_features", "evaluation"]
    content["evaluation"]["clip_on_crops"] = True
    (embedding,) = [
        row
        for row in costs(Config.model_validate(content), 1400, 500)
        if row.stage == "region_embeddings"
    ]
    assert embedding.disk == 500 * 50 * (2 * 128 + 20)


def test_an_image_is_extracted_once_however_many_classes_retrieve_it():
    """Five classes may retrieve each of ten images; 9 validation images."""
    (row,) = [r for r in costs(read_config(MINIATURE), 10, 9) if r.stage == "region_features"]
    assert row.disk == (10 + 9) * 50 * (20 + 16 + 2 * (512 + 128))


def test_impossible_numbers_are_refused():
    for options in ({"images": (0, 5)}, {"tflops": 0.0}, {"gflops": -1.0}, {"cores": 0}):
        with pytest.raises(UsageError, match="positive"):
            plan(MINIATURE, **options)


PROGRAM = """
import sys
from lpovod.apps.main import main
sys.argv[:] = ["lpovod", "plan", *sys.argv[1:]]
try:
    main()
finally:
    print("torch" in sys.modules)
"""


def command(*arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("argument", "code", "words"), [("--help", 0, "--tflops"), ("missing.yaml", 1, "no such file")]
)
def test_help_and_errors_need_no_torch(argument, code, words):
    done = command(argument)
    assert done.returncode == code and words in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_the_command_prints_the_plan():
    done = command("config.yaml", "--images", "10", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 training and 5 validation images\n")
    assert "base_detector" in rows(done.stdout)
