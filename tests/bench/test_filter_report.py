"""The page of a filter shows thresholds, rates and what each reason threw out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from PIL import Image

from fastmllm.bench.filter_report import render_filter
from fastmllm.data.filtering.decide import Example, Filtered
from fastmllm.data.filtering.rules import FilterConfig


def test_the_page_holds_rates_thresholds_and_pictures(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (400, 100), colour).save(tmp_path / f"{name}.png")
    twin = Example(
        images=(str(tmp_path / "a.png"),), text="<b>x</b>", detail="of s: 0", like=(str(tmp_path / "b.png"),)
    )
    gone = Example(images=(str(tmp_path / "none.png"),), text="y", detail="no such file")
    filtered = Filtered(
        config=FilterConfig(min_side=30, languages=("en", "zh")), seen=200, kept=150,
        dropped=Counter({"near duplicate (image)": 40, "undecodable image": 10}),
        failing=Counter({"near duplicate (image)": 41, "undecodable image": 10}),
        scores={"count": 150, "deciles": [0.1 * i for i in range(11)]}, cut=0.25,
        examples={"near duplicate (image)": [twin], "undecodable image": [gone]},
    )  # fmt: skip
    page = render_filter(filtered, "photos", "raw cosine")
    assert "150 of 200 samples are kept (75.0%)" in page
    assert "<td>near duplicate (image)</td><td>40</td><td>20.00%</td><td>41</td>" in page
    assert "<td>languages</td><td>en, zh</td>" in page
    assert page.count("data:image/jpeg") == 2  # the duplicate beside what it repeats
    assert "it cannot be decoded" in page
    assert "<b>x" not in page
    assert "raw cosine" in page
    assert "0.2500" in page
