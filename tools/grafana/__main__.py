"""`python -m tools.grafana [DIRECTORY]`: write all dashboards, by default into dashboards/."""

import json
import sys
from pathlib import Path

from tools.grafana.agents import AGENT
from tools.grafana.bills import BILL
from tools.grafana.boards import NODE, USER
from tools.grafana.document import document
from tools.grafana.jobs import JOB
from tools.grafana.languages import LANGUAGES

BOARDS = (JOB, USER, BILL, NODE, AGENT)


def files() -> dict[str, str]:
    """Paths below dashboards/, and what is in them."""
    return {
        f"{language.name}/{board.name}.json": json.dumps(document(board, BOARDS, language), indent=2) + "\n"
        for language in LANGUAGES
        for board in BOARDS
    }


def main(directory: Path) -> None:
    """Write them."""
    for name, text in files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "dashboards")
