"""Transfer and orders on a tiny model: every arm begins at the same weights and sees as much of each task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_vlm import colour_photos, tiny_vlm

pytest.importorskip("deepspeed")

import curriculum

from fastmllm import run
from fastmllm.curriculum import held_out_losses, transfer_of
from fastmllm.data.build import DataConfig, build
from fastmllm.data.phases import Phase, PhasedMixture, exposure, growing
from fastmllm.recipe import Recipe
from fastmllm.run import batches_of
from fastmllm.train.engine import EngineConfig
from fastmllm.train.stages import StageConfig

STAGE = StageConfig(name="s", steps=12, batch_size=6, trainable={"connector.*": 1e-2, "language.*": 1e-2})


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curriculum")
    return build(DataConfig(path=str(colour_photos(folder / "photos", 3)), cache=str(folder / "cache")))


def test_orders_are_compared_on_equal_terms(splits, tmp_path: Path, monkeypatch) -> None:
    seen: dict[str, Counter[str]] = {}

    def spied(model, splits, stage, *rest, **more):
        before = held_out_losses(model, splits.eval, ["name"], limit=4)["name"]
        starts.setdefault(stage.name.split("-")[0], []).append(before)
        mixture = PhasedMixture(splits.train, stage.phases, steps=stage.steps, micro_batches=1, batch_size=6)
        counts = Counter(s.task for i in range(stage.steps) for s in mixture.batch_samples(i))
        seen[stage.name] = counts
        return run.train_stage(model, splits, stage, *rest, **more)

    starts: dict[str, list[float]] = {}
    monkeypatch.setattr(curriculum, "train_stage", spied)
    found = curriculum.compare(
        tiny_vlm(0), splits, STAGE, EngineConfig(dtype="float32"), tmp_path, tasks=("name", "yes_no"), steps=6,
        alone=3, limit=4, seeds=(0,),
    )  # fmt: skip
    assert [row["order"] for row in found["rows"]] == ["curriculum", "shuffled", "reverse"]
    assert len({value for values in starts.values() for value in values}) == 1
    assert sorted(found["order"]) == ["name", "yes_no"]
    assert [found["gain"][i][i] for i in range(2)] == pytest.approx([1.0, 1.0])
    first, *others = seen.values()
    assert all(abs(counts[task] - first[task]) <= 3 for counts in others for task in first)  # of 36 draws
    assert len({row["mean"] for row in found["rows"]}) == 3
    assert curriculum.table(found).row_count == 3


def test_the_reverse_shows_each_task_as_often() -> None:
    phases = growing(("a", "b", "c"))
    wanted = exposure(phases)
    reverse = curriculum._same_exposure(growing(("c", "b", "a")), wanted)
    assert exposure(reverse) == pytest.approx(wanted)
    assert [set(phase.mixture) for phase in reverse] == [{"c"}, {"c", "b"}, {"c", "b", "a"}]


def test_phases_change_tasks_sizes_and_tokens_of_batches(splits, tmp_path: Path) -> None:
    phases = (
        Phase(share=1, mixture={"name": 1}, image_size=16, visual_tokens=(1,)), Phase(share=1, mixture={"yes_no": 1}),
    )  # fmt: skip
    stage = StageConfig(name="p", steps=4, batch_size=3, trainable={"connector.*": 1e-2}, phases=phases)
    batch = batches_of(tiny_vlm(0), splits.train, stage, EngineConfig(dtype="float32", accumulation=2), tmp_path)
    made = [batch(index) for index in range(8)]
    assert [b.pixels.shape[1] for b in made] == [16] * 4 + [32] * 4
    assert [len(b.image_index) // 3 for b in made] == [1] * 4 + [4] * 4
    assert [{name.split("/")[1] for name in b.ids} for b in made] == [{"name"}] * 4 + [{"yes_no"}] * 4


def test_stages_and_tasks_without_sense(splits, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="phases have mixtures"):
        StageConfig(name="p", steps=4, trainable={"c": 1}, mixture={"name": 1}, phases=(Phase(share=1),))
    with pytest.raises(ValueError, match="has none"):
        StageConfig(name="p", steps=1, trainable={"c": 1}, phases=(Phase(share=1), Phase(share=1)))
    with pytest.raises(ValueError, match="a phase of stage 's'"):
        run.available(Phase(share=1, mixture={"nome": 1}), splits.train, "s")
    with pytest.raises(ValueError, match="no questions of count"):
        transfer_of(tiny_vlm(0), splits, STAGE, EngineConfig(), ["name", "count"], tmp_path, steps=2)


def test_a_recipe_says_its_phases(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {image_size: 32, visual_tokens: 4, dtype: float32}\nstages:\n  - name: s\n    steps: 8\n"
        "    trainable: {connector.*: 1e-2}\n    phases:\n      - {share: 1, mixture: {name: 1}, visual_tokens: [1]}\n"
        "      - {share: 3, mixture: {name: 1, yes_no: 2}, image_size: 16}\n"
    )
    (stage,) = Recipe.load(tmp_path / "r.yaml").stages
    assert [(phase.share, phase.image_size, phase.visual_tokens) for phase in stage.phases] == [
        (1, None, (1,)),
        (3, 16, ()),
    ]
