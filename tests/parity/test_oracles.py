"""The oracles alone, without a line of minidiff: where these fail, it is they that do not fit each other."""

from . import oracles


def test_every_oracle_is_pinned_exactly():
    assert oracles.IMPORTS <= oracles.pins().keys()


def test_the_pinned_oracles_are_installed_and_work_together():
    assert oracles.complaint() is None


def test_a_version_that_is_not_the_pinned_one_is_named(monkeypatch):
    monkeypatch.setattr(oracles, "pins", lambda: {"scipy": "0.0.1"})
    complaint = oracles.complaint.__wrapped__()
    assert complaint.startswith("the oracle scipy is ") and "pinned is 0.0.1" in complaint


def test_oracles_that_refuse_each_other_are_told_apart_from_us(monkeypatch):
    def refuse() -> None:
        raise ValueError("please use a version >= 0.22.0")

    monkeypatch.setattr(oracles, "_lora_in_a_text_encoder", refuse)
    assert oracles.complaint.__wrapped__().startswith(
        "the oracles do not work together (ValueError: please use"
    )
