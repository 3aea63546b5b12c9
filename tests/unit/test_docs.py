"""Pages that are made from the code, held against the code."""

import re
from pathlib import Path

from exporters.reference import markdown

REPO = Path(__file__).parents[2]


def test_the_metrics_page_is_the_catalogue() -> None:
    assert (REPO / "docs" / "metrics.md").read_text() == markdown(), "run: make docs"


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in [*REPO.glob("*.md"), *REPO.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_imports_point_down() -> None:
    floor = {
        "acctd.errors": 0, "acctd.metrics": 0, "acctd.model": 0, "acctd.policies": 0, "acctd.requests": 0,
        "acctd.wording": 0, "acctd.accounts": 1, "acctd.kernel": 1, "acctd.cgroup": 2, "acctd.network": 2,
        "collectors": 2, "acctd.config": 3, "acctd.frames": 3, "acctd.ledger": 3, "acctd.meter": 3, "acctd.rows": 3,
        "acctd.history": 3, "acctd.points": 3, "acctd.samplefile": 3, "acctd.archive": 5, "acctd.samples": 5,
        "acctd.integrals": 3, "acctd.midnights": 3,
        "acctd.verification": 3, "acctd.sqlitefile": 3, "acctd.statement": 5,
        "acctd.sinks": 3, "acctd.spool": 3, "acctd.tables": 3, "acctd.varlink": 3, "acctd.job": 4, "acctd.mending": 4,
        "acctd.oomprogram": 4, "acctd.readers": 4, "acctd.scratch": 4, "acctd.tracking": 4, "exporters": 4,
        "acctd.agent": 5, "acctd.alarms": 5, "acctd.books": 5, "acctd.chirps": 5, "acctd.cost": 5, "acctd.ears": 5,
        "acctd.enclosure": 5, "acctd.errands": 5, "acctd.exporting": 5, "acctd.family": 5, "acctd.guard": 5,
        "acctd.inquest": 5, "acctd.launch": 5, "acctd.ledgers": 5, "acctd.news": 5, "acctd.outbox": 5,
        "acctd.outlet": 5, "acctd.recovery": 5, "acctd.relays": 5, "acctd.sentry": 5, "acctd.shares": 5,
        "acctd.shortages": 5, "acctd.spoolroom": 5, "acctd.views": 5, "acctd.vigil": 5, "acctd.warden": 5,
        "acctd.watched": 5, "acctd.whereabouts": 5, "acctd.wishes": 5, "acctd.caller": 6, "acctd.daemon": 6,
        "acctd.client": 7, "acctd.methods": 7, "acctd.server": 7, "acctd.cli": 8, "acctd.report": 8,
        "acctd.__main__": 9,
    }  # fmt: skip

    apart = {
        "acctd.guardian",
        "acctd.isolate",
        "acctd.hook",
        "acctd.hookwishes",
        "acctd.hookmonitor",
        "acctd.hookchirp",
        "acctd.hookcall",
        "acctd.hookexec",
        "acctd.enter",
        "acctd.helper",
    }

    def place(module: str) -> int | None:
        return next((f for name, f in floor.items() if module == name or module.startswith(f"{name}.")), None)

    modules = [p for folder in ("acctd", "collectors", "exporters") for p in (REPO / folder).rglob("*.py")]
    assert len(modules) > 40
    for path in modules:
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        imported = re.findall(
            r"^\s*(?:from|import) ((?:acctd|collectors|exporters)[\w.]*)", path.read_text(), re.MULTILINE
        )
        if name in apart:
            assert {*imported} <= {"acctd", *apart}, "the hook stands apart"
        if (own := place(name)) is not None:
            for other in imported:
                assert other == "acctd" or (place(other) or 0) <= own, f"{name} (floor {own}) imports {other}"
