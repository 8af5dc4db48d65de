"""Energy is told where the kernel counts it, by package and not by its parts, and nothing is made up elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runs import energy


def test_packages_are_summed_and_a_counter_that_begins_anew_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "PACKAGES", tmp_path)
    monkeypatch.setattr(energy, "_gpus", lambda: [])
    assert energy.Meter().watt_hours() is None
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):  # the last is the cores, a part of package 0
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1000000\n")
    meter = energy.Meter()
    for name, joules in (("intel-rapl:0", 3601), ("intel-rapl:1", 1801), ("intel-rapl:0:0", 9999)):
        (tmp_path / name / "energy_uj").write_text(f"{joules}000000\n")
    assert meter.watt_hours() == pytest.approx(1.5)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("5\n")
    assert meter.watt_hours() is None
