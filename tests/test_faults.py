"""The table of planted faults fits the code and the tests; ``python -m tests.plant_faults`` plants them."""

from tests.plant_faults import ROOT, misfits, read_faults


def test_every_fault_can_be_planted_and_names_a_test() -> None:
    faults = read_faults((ROOT / "tests/faults.md").read_text())
    assert [fault.number for fault in faults] == list(range(1, len(faults) + 1))
    assert misfits(faults, ROOT) == []
    for fault in faults:
        file, *names = fault.test.partition("[")[0].split("::")
        source = (ROOT / file).read_text()
        assert all(f"def {name}(" in source or f"class {name}" in source for name in names), fault.test
