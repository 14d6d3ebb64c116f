"""The page in a real browser: what a person sees, presses and finds. One browser and one server for all tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from skyrl_train.run.metrics import MetricsLog
from skyrl_train.run.records.report import write_report
from skyrl_train.run.records.trajectories import TrajectoryStore
from skyrl_train.view.library import Library
from tests.browser import Browser, chromium, headless_browser
from tests.skyrl_train.run.records.episodes import TOKENIZER, prompt, trajectory
from tests.skyrl_train.view.conftest import EVIL_NAME, NUM_STEPS, read_whole, served, write_run, write_step

pytestmark = pytest.mark.skipif(chromium() is None, reason="needs a Chromium (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def library(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    live = tmp_path_factory.mktemp("live")
    write_run(live / "growing", num_steps=2)
    return read_whole(runs, live)


@pytest.fixture(scope="module")
def address(library: Library) -> Generator[str]:
    with served(library) as address:
        yield address


@pytest.fixture(scope="module")
def opened() -> Generator[Browser]:
    with headless_browser() as browser:
        yield browser


@pytest.fixture
def browser(opened: Browser, address: str) -> Generator[Browser]:
    """The browser, which must neither meet an error nor ask anybody else, whatever the test does."""
    opened.errors.clear()
    opened.requests.clear()
    opened.size(1280, 800)
    yield opened
    assert opened.errors == []
    asked = {
        urlsplit(request).netloc for request in opened.requests if not request.startswith(("data:", "about:", "file:"))
    }
    assert asked <= {urlsplit(address).netloc}
    assert opened.run("document.querySelectorAll('main img, main script, main style').length") == 0


@pytest.fixture(scope="module")
def run(library: Library) -> str:
    return next(name for name, entry in library.entries.items() if entry.summary["step"] == NUM_STEPS)


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")


def overflow(browser: Browser) -> int:
    """Return by how many pixels the page is wider than the window."""
    return browser.run("document.documentElement.scrollWidth - innerWidth")


def test_the_table_shows_every_run_and_the_search_and_the_keys_work(browser, address, run):
    browser.open(address)
    browser.until("document.querySelectorAll('.row .spark-line').length === 3")
    assert any(EVIL_NAME in name for name in texts(browser, ".run-name a"))
    assert "0.000 → 1.000" in texts(browser, ".run-reward")
    browser.press("/")
    browser.type("alert(3)")
    browser.until("document.querySelectorAll('.row').length === 1")
    browser.press("Escape", "j", "x")
    browser.until("!document.querySelector('.chosen').hidden")
    assert texts(browser, ".chosen span") == ["1 chosen"]
    browser.press("Enter")
    browser.until(f"location.hash === '#/run/{run}'")
    browser.press("Escape")
    browser.until("location.hash === '#/'")


def test_the_order_follows_the_head_that_was_pressed(browser, address):
    browser.open(address)
    browser.until("document.querySelectorAll('.row .spark-line').length === 3")
    for sign in ("↓", "↑"):
        browser.run(
            "[...document.querySelectorAll('.head')].find((head) => head.innerText.startsWith('episodes')).click()"
        )
        browser.until(f"document.querySelector('.head[aria-pressed=true]').innerText.includes('{sign}')")
        counts = [
            int(text)
            for text in browser.run(
                "[...document.querySelectorAll('.row .run-grid')].map((row) => row.children[5].innerText)"
            )
        ]
        assert counts == sorted(counts, reverse=sign == "↓")
        assert len(set(counts)) > 1


def test_curves_of_two_runs_lie_over_each_other_and_their_settings_differ(browser, address, library, runs):
    ids = [name for name, entry in library.entries.items() if entry.folder.root == runs]
    browser.open(f"{address}#/curves?" + "&".join(f"run={name}" for name in ids))
    browser.until("document.querySelectorAll('.chart .u-over').length >= 4")
    assert len(texts(browser, ".legend-run")) == 2
    assert texts(browser, ".chart h3")[0] == "reward/avg_raw_reward"
    assert len(texts(browser, ".chart:first-child .chart-read .mark")) == 2
    assert any("optimizer_config.lr" in row for row in texts(browser, ".settings tbody th"))
    assert EVIL_NAME not in texts(browser, ".settings tbody th")  # the same in both
    browser.press("/")
    browser.type("policy/grad_norm")
    browser.press("Enter")
    browser.until("document.querySelector('.chart h3').innerText === 'policy/grad_norm'")
    assert "key=policy" in browser.run("location.hash")


def test_smoothing_changes_the_numbers_under_the_cursor(browser, address, run):
    browser.open(f"{address}#/run/{run}/curves?key=reward%2Favg_raw_reward")
    browser.until("document.querySelector('.chart .u-over')")
    # 0, 1, 2, 3 with weight 0.9: (1 * 0.81 + 2 * 0.9 + 3) / (1 + 0.9 + 0.81 + 0.729)
    for weight, smoothed in (("0.9", f"{(0.81 + 1.8 + 3) / 3.439:.3f}"), ("0", "3")):
        browser.run(
            "{ const slider = document.querySelector('input[type=range]');"
            f"slider.value = {weight}; slider.dispatchEvent(new Event('input')); }}"
        )
        browser.until(f"document.querySelector('.field .number').innerText === '{float(weight):.2f}'")
        browser.until(f"document.querySelector('.chart-read').innerText.trim().split(/\\s+/).at(-1) === '{smoothed}'")


def test_numbers_that_no_axis_can_hold_stop_nothing(browser, address, run):
    keys = ["odd/huge", "odd/tiny", "odd/noise", "odd/nan", "odd/infinite", "policy/grad_norm"]
    browser.open(f"{address}#/run/{run}/curves?" + urlencode([("key", key) for key in keys]))
    for _ in range(2):
        browser.until("document.querySelector('.chart:last-child .chart-read')?.innerText.includes('step 4')")
        assert texts(browser, ".chart h3") == keys
        browser.run("document.querySelector('.field input[type=checkbox]').click()")  # and with a logarithmic axis


def test_episodes_are_filtered_and_walked_by_keyboard(browser, address, run):
    browser.open(f"{address}#/run/{run}/episodes")
    browser.until("document.querySelector('.talk')")
    browser.press("/")
    browser.type("word1")
    browser.until("document.querySelector('.filters .count').innerText === '12 episodes'")
    browser.press("Enter")
    browser.until("document.querySelector('.reader-head').innerText.includes('prompt task1')")
    first = texts(browser, ".reader-head")
    browser.press("j", "j")
    browser.until(f"document.querySelector('.reader-head').innerText !== {json.dumps(first[0])}")
    browser.press("]")
    browser.until("document.querySelector('.pill.here')")
    browser.press("g")
    browser.until("document.querySelectorAll('.column').length === 3")
    assert [text.split()[0] for text in texts(browser, ".column .pill")] == ["2", "3", "4"]


def test_a_token_tells_its_logprob_advantage_and_mask_by_hover_and_by_key(browser, address, run):
    browser.open(f"{address}#/run/{run}/episodes?text=%22try+3+b%22&prompt=task1")
    browser.until("document.querySelector('.talk')")
    browser.press("ArrowRight")
    browser.until("!document.getElementById('tip').hidden")
    [told] = texts(browser, "#tip")
    assert told.startswith('"t"   id ')
    assert "logprob -" in told
    assert "%" in told
    assert "advantage 0." in told
    assert told.endswith("mask: trained on")
    assert browser.run("document.querySelectorAll('.sampled i[class*=s]').length") > 10
    browser.press("v")
    browser.until("document.querySelector('.sampled i.up1, .sampled i.up2, .sampled i.up3, .sampled i.up4')")
    browser.press("v")
    browser.until("document.querySelectorAll('.sampled i.trained').length > 10")
    assert browser.run("document.querySelectorAll('.given i.trained').length") == 0
    browser.press("v", "v", "Escape")
    browser.until("document.getElementById('tip').hidden")
    box = browser.run(
        "(() => { const b = document.querySelector('.given i').getBoundingClientRect(); return [b.x + 2, b.y + 4]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    browser.until("document.getElementById('tip').innerText.includes('given to the policy')")


def test_a_validation_task_is_followed_over_the_steps(browser, address, run):
    browser.open(f"{address}#/run/{run}/tasks")
    browser.until("document.querySelectorAll('.task-row .cell').length === 9")
    assert texts(browser, ".rows .task-row")[0].split()[0] == "held2"  # it changed the most
    browser.press("j", "Enter")
    browser.until("document.querySelectorAll('.column').length === 3")
    assert texts(browser, ".column header a") == ["step 0", "step 2", "step 4"]


@pytest.mark.parametrize("place", ["", "/curves", "/episodes", "/tasks", "/settings"])
def test_nothing_that_was_said_becomes_markup_on_a_phone_or_a_desk(browser, address, run, place):
    """The fixture looks for errors, dialogs, other addresses and elements; here for the width, light and dark."""
    for width, dark in ((360, True), (420, True), (1280, False)):
        browser.size(width, 860, dark=dark)
        browser.open(f"{address}#/run/{run}{place}" if place else address)
        browser.until("document.querySelector('.row, .chart .u-over, .settings')")
        assert overflow(browser) == 0
        smallest = browser.run(
            "Math.min(...[...document.querySelectorAll('main *')]"
            ".filter((node) => !node.childElementCount && node.innerText && node.offsetParent)"
            ".map((node) => parseFloat(getComputedStyle(node).fontSize)))"
        )
        assert smallest >= 10.5


@pytest.fixture
def another_run(library) -> Generator[Path]:
    """A run of one step, of a single test."""
    folder = write_run(library.roots[1] / "another", num_steps=1)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    library.look_for_runs()


def test_each_start_of_a_run_is_a_table_and_not_raw_json(browser, address, library, another_run):
    folder = another_run
    first = {
        "started": "2026-11-28T12:54:40+00:00", "ended": "failed", "ended_at": "2026-11-28T12:55:02+00:00",
        "error": "OSError: the disk is full", "command": "skyrl train --env echo_env trainer.epochs=4",
        "folder": "/home/me", "first_step": 0, "process": 12,
        "commits": {"skyrl-train": "26162d9"}, "versions": {"torch": "2.13.0", "ray": "2.60.0"},
    }  # fmt: skip
    second = first | {"started": "2026-11-29T08:00:00+00:00", "ended": None, "ended_at": None, "error": None}
    run_info = json.loads((folder / "run.json").read_text()) | {"starts": [first, second]}
    (folder / "run.json").write_text(json.dumps(run_info))
    library.look_for_runs()
    [run] = [name for name, entry in library.entries.items() if entry.folder.path == folder]
    browser.open(f"{address}#/run/{run}/settings")
    browser.until("document.querySelectorAll('table.start').length === 2")
    newest, oldest = (dict(line.split("\t") for line in text.split("\n")) for text in texts(browser, "table.start"))
    assert (newest["started"], newest["ended"]) == (second["started"], "not recorded")
    assert "error" not in newest
    assert oldest["ended"] == "failed, 2026-11-28T12:55:02+00:00"
    assert oldest["error"] == first["error"]
    assert oldest["command"] == first["command"]
    assert (oldest["commits"], oldest["versions"]) == ("skyrl-train 26162d9", "torch 2.13.0, ray 2.60.0")
    browser.until("document.querySelector('.run-head .state').innerText === 'killed'")  # nobody saw it end
    browser.size(360, 860)
    assert overflow(browser) == 0


@pytest.mark.parametrize("width", [360, 420])
def test_on_a_phone_an_episode_opens_over_the_list_and_escape_leads_back(browser, address, run, width):
    browser.size(width, 860)
    browser.open(f"{address}#/run/{run}/episodes")
    browser.until("document.querySelector('.episode-row')")
    assert not browser.run("document.querySelector('.reader-side').offsetParent")
    browser.press("j", "Enter")
    browser.until("document.querySelector('.reader-side').offsetParent && document.querySelector('.talk')")
    assert overflow(browser) == 0
    browser.press("Escape")
    browser.until("document.querySelector('.list-side').offsetParent")


def test_the_page_follows_a_run_while_it_trains(browser, address, library):
    entry = next(entry for entry in library.entries.values() if entry.folder.path.name == "growing")
    folder, run = entry.folder.path, entry.folder.id
    browser.open(f"{address}#/run/{run}/episodes?phase=train")
    browser.until("document.querySelector('.filters .count')?.innerText === '18 episodes'")
    store, log = TrajectoryStore(folder, TOKENIZER), MetricsLog(folder)
    write_step(folder, 3, store, log)
    store.close()
    log.close()
    browser.until("document.querySelector('.filters .count').innerText === '27 episodes'")
    browser.until("document.querySelector('.run-head').innerText.includes('3 of 2')")
    assert texts(browser, ".row .about b")  # the list is still there


def test_a_run_that_is_deleted_while_it_is_shown_is_called_gone_and_leaves_the_table(
    browser, address, library, another_run
):
    folder = another_run
    library.look_for_runs()
    [run] = [name for name, entry in library.entries.items() if entry.folder.path == folder]
    browser.open(f"{address}#/run/{run}")
    browser.until("document.querySelector('.run-head').innerText.includes('1 of 1')")
    browser.until("document.querySelector('.status').innerText === 'up to date'")
    shutil.rmtree(folder)
    browser.until("document.querySelector('.status').innerText === 'this run is no longer there'")
    assert "1 of 1" in texts(browser, ".run-head")[0]  # what was read stays
    browser.press("Escape")
    browser.until("document.querySelectorAll('.row').length === 3")
    assert not any("another" in name for name in texts(browser, ".run-name a"))


def test_the_help_opens_and_light_becomes_dark(browser, address):
    browser.open(address)
    browser.until("document.querySelector('.row')")
    before = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.press("t")
    browser.until(f"getComputedStyle(document.body).backgroundColor !== {json.dumps(before)}")
    browser.press("t", "?")
    browser.until("document.getElementById('help').open")
    assert "logprob" in texts(browser, "#help")[0]
    browser.press("Escape")
    browser.until("!document.getElementById('help').open")


@pytest.mark.parametrize("width", [320, 360, 420, 760])
def test_the_report_is_readable_on_a_phone_and_its_filter_shows_what_it_says(browser, runs, width):
    report = write_report(runs / EVIL_NAME)
    browser.size(width, 860)
    browser.open(report.as_uri())
    assert overflow(browser) <= 0  # less than 0: the bar beside a long page
    shown = "[...document.querySelectorAll('svg text')].filter((text) => text.getBoundingClientRect().width)"
    drawn = "(text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().d"  # in pixels of the window
    assert browser.run(f"Math.min(...{shown}.map({drawn}))") >= 9.9
    assert texts(browser, ".pick:first-of-type span")[:4] == ["all", "best", "typical", "worst"]
    assert len(set(texts(browser, ".when"))) > 2
    for label in ("best", "most changed", "worst"):
        browser.run(f"document.querySelector('.pick input[value=\"{label}\"]').click()")
        first = browser.run(
            "[...document.querySelector('.episodes').querySelectorAll('.episode:not([hidden]) .label')]"
            ".map((node) => node.innerText.toLowerCase())"
        )
        assert all(label in text for text in first)
        assert len(first) == 2


NAMES = ["constructor", "__proto__", "toString", "hasOwnProperty"]  # what every JavaScript object has
HIDDEN = "seen\U000e0041\U000e0042\u180e\u2066\ue000"  # invisible: tags, a vowel separator, an isolate, no character


@pytest.fixture(scope="module")
def odd(library: Library, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two more runs of the library, of which one calls everything by names of JavaScript's own."""
    root = tmp_path_factory.mktemp("odd")
    write_run(root / "plain", num_steps=1)
    folder = write_run(root / "__proto__", num_steps=1)
    store = TrajectoryStore(folder, TOKENIZER)
    names = {name: {"said": name} for name in NAMES}
    store.add(
        "eval",
        2,
        [
            trajectory([f"{HIDDEN}{name}"], [1e308], of=prompt(name, name, name), env_metrics=names, observation=name)
            for name in NAMES
        ],
    )
    store.close()
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"step": 2**52, "time": -1e300, "elapsed_s": 1e308, "reward/avg_raw_reward": -1e308, "huge": 1e308}
        file.write(json.dumps(line | dict.fromkeys(NAMES, 1.5)) + "\n")
    run_info = json.loads((folder / "run.json").read_text())
    run_info |= {"model": NAMES[1], "changed": {name: [name, "2"] for name in NAMES}, "total_steps": 10**400}
    run_info["starts"] = [None, 7, {"ended": ["odd"], "versions": NAMES, "commits": {"__proto__": {"a": None}}}]
    (folder / "run.json").write_text(json.dumps(run_info))
    library.roots.append(root.resolve())
    library.look_for_runs()
    ids = {entry.folder.name.rpartition("/")[2]: name for name, entry in library.entries.items()}
    return [ids["plain"], ids["__proto__"]]


def test_names_of_javascripts_own_and_numbers_without_bounds_stop_no_page(browser, address, odd):
    plain, strange = odd
    library_is_read = "document.querySelector('.status').innerText === 'up to date'"
    browser.open(address)
    browser.until(f"{library_is_read} && document.querySelectorAll('.row .spark-line').length >= 5")
    wanted = urlencode([("run", plain), ("run", strange), *(("key", name) for name in [*NAMES, "huge"])])
    browser.open(f"{address}#/curves?{wanted}")
    browser.until(
        "document.querySelectorAll('.chart h3').length === 5 && document.querySelectorAll('table.settings td')[9]"
    )
    assert [text.split("\n")[-1] for text in texts(browser, ".chart-read")][:4] == ["1.5"] * 4
    rows = browser.run("[...document.querySelectorAll('.settings tr')].map((row) => row.innerText.split('\\t'))")
    assert [row for row in rows if row[0] in NAMES] == [[name, "2", name] for name in sorted(NAMES)]
    browser.open(f"{address}#/run/{strange}/episodes?phase=eval&step_from=2")
    browser.until("document.querySelectorAll('.reader .said').length > 0")
    assert len(texts(browser, ".episode-row")) == len(NAMES)
    [said] = texts(browser, ".reader .sampled .said")
    assert said.startswith("seen\\ue0041\\ue0042\\u180e\\u2066\\ue000")
    browser.run("document.querySelector('.extras').open = true")
    told = " ".join(texts(browser, ".extras th"))
    assert all(name in told for name in NAMES)
    for place in ("tasks", "settings", "curves", "task/__proto__", "task/constructor"):
        browser.open(f"{address}#/run/{strange}/{place}")
        browser.until(
            "document.querySelector('.facts, .run-head .fact') && document.querySelector('main').innerText.length > 40"
        )
    assert browser.run("({}).said") is None, "no prototype was written to"


FOCUSED = """(() => {
  const node = document.activeElement;
  return [node.tagName, node.getAttribute("aria-label") || node.innerText || ""];
})()"""


@pytest.mark.parametrize(
    ("place", "control", "key"),
    [
        ("", ".row input", " "),
        ("", ".heads button", "Enter"),
        ("#/curves?run=GROWING&run=RUN", ".legend-run", "Enter"),
        ("#/curves?run=GROWING&run=RUN", "section.card a", ""),
        ("#/run/GROWING/settings", ".path a[href*=run]", ""),
        ("", ".row a", ""),
        ("#/run/RUN/episodes?phase=train", ".siblings button:not(.here)", "Enter"),
    ],
)
def test_what_is_drawn_anew_keeps_the_focus(browser, address, library, run, place, control, key):
    """A key on the control redraws it; without one a new line of metrics does, while the run trains."""
    entry = next(entry for entry in library.entries.values() if entry.folder.path.name == "growing")
    found = f"document.querySelector({json.dumps(control)})"
    browser.open(address + place.replace("GROWING", entry.folder.id).replace("RUN", run))
    browser.until(f"{found} && document.querySelector('.status').innerText === 'up to date'")
    browser.run(f"window.drawn = {found}; drawn.focus()")
    tag, name = browser.run(FOCUSED)
    if key:
        browser.press(key)
    else:
        log = MetricsLog(entry.folder.path)
        log.log(5, {"reward/avg_raw_reward": 1.0})
        log.close()
    browser.until("!drawn.isConnected && document.activeElement !== document.body")
    assert browser.run(FOCUSED) == [tag, name.removesuffix("\n↓") + ("\n↓" if control == ".heads button" else "")]


def test_the_focus_moves_to_the_neighbour_of_a_control_that_is_gone(browser, address, run):
    browser.open(f"{address}#/run/{run}")
    browser.until("document.querySelectorAll('.chart button').length > 2")
    names = browser.run("[...document.querySelectorAll('.chart button')].map((node) => node.ariaLabel)")
    browser.run("document.querySelectorAll('.chart button')[1].focus()")
    browser.press("Enter")
    browser.until(f"document.querySelectorAll('.chart button').length === {len(names) - 1}")
    assert browser.run(FOCUSED)[1] == names[2]


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize(
    "place", ["", "#/curves?run=GROWING&run=RUN", *(f"#/run/RUN/{part}" for part in ("curves", "episodes", "tasks"))]
)
def test_tab_goes_to_every_control_in_order_and_each_is_seen(browser, address, library, run, place, width):
    entry = next(entry for entry in library.entries.values() if entry.folder.path.name == "growing")
    browser.size(width, 800)
    browser.open(address + place.replace("GROWING", entry.folder.id).replace("RUN", run))
    browser.until("document.querySelector('.row, .chart .u-over') && document.querySelector('.dot:not(.busy)')")
    controls = browser.run(
        "(window.controls = [...document.querySelectorAll('a, button, input, select, summary')]"
        ".filter((node) => node.offsetParent)).length"
    )
    reached = []
    while len(reached) < 2 * controls:
        browser.press("Tab")
        at, is_seen = browser.run(SEEN)
        if at in (-1, *reached[:1]):  # behind the last one
            break
        if at is not None:  # a list: its rows are walked by other keys
            reached.append(at)
            assert is_seen, browser.run(f"controls[{at}].outerHTML")
    assert reached == list(range(controls))


# The place of the focused control among all, null for a list that has the focus, -1 for the page; whether its outline
# is in sight on all sides.
SEEN = """(() => {
  const node = document.activeElement, style = getComputedStyle(node), box = node.getBoundingClientRect();
  if (node === document.body) return [-1, false];
  const at = controls.indexOf(node), more = parseFloat(style.outlineOffset) + parseFloat(style.outlineWidth);
  let seen = node.matches(":focus-visible") && style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  const within = (left, top, right, bottom) => box.left - more >= left - 1 && box.right + more <= right + 1 &&
    box.top - more >= top - 1 && box.bottom + more <= bottom + 1;
  seen &&= within(0, 0, innerWidth, innerHeight);
  for (let parent = node.parentElement; parent !== document.body; parent = parent.parentElement) {
    const cut = parent.getBoundingClientRect();
    if (getComputedStyle(parent).overflow !== "visible") seen &&= within(cut.left, cut.top, cut.right, cut.bottom);
  }
  return [at < 0 ? null : at, seen];
})()"""
