"""A picture's plan: verdicts, tables, JSON and the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import picture
from rich.console import Console

from fastmllm import cli
from fastmllm.plan.cost import Batch
from fastmllm.plan.image_plan import ImagePlan, image_size, plan_image
from fastmllm.plan.machine import find_machine
from fastmllm.plan.table import notes, show, verdict
from fastmllm.train.devices import DEVICES


@pytest.fixture(scope="module")
def plan() -> ImagePlan:
    return plan_image((1920, 1080), compress="visionzip:64", llm="smollm2-135m")


def test_the_whole_is_the_sum_of_its_parts(plan: ImagePlan) -> None:
    costs = plan.costs
    for phase in plan.phases().values():
        assert phase.seconds == pytest.approx(sum(work.seconds for work in phase.parts.values()))
        for work in phase.parts.values():
            most = max(work.flops / DEVICES["h200"].flops["bfloat16"], work.bytes / DEVICES["h200"].bandwidth)
            assert work.seconds >= most * (1 - 1e-9)
    assert plan.first_token_s == pytest.approx(costs.encode.seconds + costs.prefill.seconds)
    assert plan.answer_s == pytest.approx(plan.first_token_s + 128 * costs.decode.seconds)
    shares = plan.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares["decode: llm"] == pytest.approx(128 * costs.decode.parts["llm"].seconds / plan.answer_s)


def test_what_a_plan_says_is_printed(plan: ImagePlan) -> None:
    console = Console(record=True, width=160)
    show(plan, console)
    said = console.export_text()
    for words in (
        "internvl (InternViT-300M-448", "9 (2 x 4)", "1,792 x 896, 1.61 MP", "11% (overview 11%)", "2,304", "576",
        "tower, attention", "compressor", "language model", "to the first token", "Where the time goes: ", "It fits: ",
        "989.4 TFLOP/s", "4,800 GB/s", "NVIDIA H200",
    ):  # fmt: skip
        assert words in said, words
    assert f"{plan.costs.encode.parts['vision'].flops / 1e12:.4g}" in said
    assert "windows count as full" in " ".join(notes(plan))


def test_what_does_not_fit_is_said_with_the_numbers(plan: ImagePlan) -> None:
    assert plan.fits
    costs, most = plan.costs, plan.most_samples
    each = (costs.total - costs.weights) / plan.batch.samples
    assert costs.weights + most * each <= plan.room < costs.weights + (most + 1) * each
    small = replace(plan, device=replace(plan.device, memory=(plan.costs.total - 1) / 0.92))
    assert not small.fits
    assert small.most_samples == 0
    assert f"It does not fit: it needs {plan.costs.total / 1e9:.1f} GB of the 1.1 GB that tensors" in verdict(small)
    assert "of weights, 0.0 GB of keys and values" in verdict(small)
    tiny = replace(plan, device=replace(plan.device, memory=plan.costs.weights / 2))
    assert "the weights alone" in verdict(tiny)
    short = replace(plan, context=700)
    assert f"{plan.costs.prompt + 128 - 700:,} more than the 700 of smollm2-135m" in verdict(short)
    many = plan_image((1920, 1080), llm="smollm2-135m", batch=Batch(samples=4))
    one = plan_image((1920, 1080), llm="smollm2-135m")
    assert many.costs.kv == 4 * one.costs.kv
    assert many.most_samples == pytest.approx(one.most_samples, rel=0.05)


def test_an_image_is_a_size_or_a_file(tmp_path: Path) -> None:
    picture(30, 20).save(tmp_path / "a.png")
    assert image_size("1920x1080") == (1920, 1080)
    assert image_size(str(tmp_path / "a.png")) == (30, 20)
    with pytest.raises(ValueError, match=r"'b\.png' is neither WIDTHxHEIGHT, such as 1920x1080, nor a file"):
        image_size("b.png")


def test_a_mistake_is_named() -> None:
    with pytest.raises(ValueError, match="unknown device 'h1000'; choose one of a100, h100, h200, b200, cpu"):
        plan_image((9, 9), device="h1000")
    with pytest.raises(ValueError, match="unknown llm 'gpt'"):
        plan_image((9, 9), llm="gpt")
    with pytest.raises(ValueError, match="unknown policy 'gpt'"):
        plan_image((9, 9), policy="gpt")
    with pytest.raises(ValueError, match=r"in front of layer 24, but qwen2\.5-0\.5b has 24 layers"):
        plan_image((336, 336), policy="llava-1.5", compress="pyramiddrop", llm="qwen2.5-0.5b")


def test_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmllm.bench.roofline import Rates
    from fastmllm.plan import machine

    monkeypatch.setattr(machine, "measure_rates", lambda dtype: Rates(flops=3e9, bytes=2e9))
    found = find_machine("cpu", "bfloat16")
    assert (found.flops, found.bandwidth) == ({"bfloat16": 3e9}, 2e9)
    assert find_machine("a100", "bfloat16") is DEVICES["a100"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fastmllm", "plan", *arguments])
    cli.main()


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, drawn = tmp_path / "a.png", tmp_path / "tiles.png"
    picture(640, 480).save(file)
    options = ("--policy", "llava-next", "--llm", "smollm2-135m", "--device", "a100", "--json")
    run(monkeypatch, "--image", str(file), *options, "--picture", str(drawn))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"]["llm"] == 2340
    assert found["image"]["tiles"] == 5
    assert found["device"] == "A100 SXM 80 GB"
    assert found["memory"]["fits"] is True
    assert found["phases"]["prefill"]["parts"]["llm"]["flops"] > 0
    assert drawn.stat().st_size > 0
    run(monkeypatch, "image", "--image", "640x480", *options)
    assert json.loads(capsys.readouterr().out)["tokens"] == found["tokens"]
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    assert "image" in (said := capsys.readouterr().out)
    assert "train" in said
    with pytest.raises(SystemExit):
        run(monkeypatch, "--image", "640x480", "--policy", "none")
    assert capsys.readouterr().err.startswith("error: plan: unknown policy 'none'; choose one of llava-1.5")
