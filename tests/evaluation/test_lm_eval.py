"""An exported folder under lm-evaluation-harness, on a task that lies in a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.conftest import opened

pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ITEMS = [
    ("def __init__(self", [", name):", " the grass"]),
    ("import", [" os", " zzz"]),
    ("return", [" None", " qqqq"]),
    ("for i in", [" range(", "; the"]),
    ("if x is", [" None:", " blue."]),
]
TASK = """\
task: local_lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_a_local_task_has_the_accuracy_that_our_scores_give(run: Path, tmp_path: Path) -> None:
    from data_tools.tokenizer import load_tokenizer
    from megatron_ext.checkpoint.huggingface import export_hf

    export_hf(run, tmp_path / "hf", lengths=[64])
    tokenizer, right = load_tokenizer(tmp_path / "hf"), 0
    with opened(run) as scorer:
        for prompt, choices in ITEMS:
            sums = []
            for choice in choices:
                ids = tokenizer.encode(prompt + choice)
                last = len(ids) - len(tokenizer.encode(prompt))
                sums.append(scorer.score(ids[None], last=last).log_probs.sum())
            right += bool(sums[0] > sums[1])
    lines = [json.dumps({"prompt": p, "choices": c, "label": 0}) for p, c in ITEMS]
    (tmp_path / "task").mkdir()
    (tmp_path / "task/local.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "task/local.yaml").write_text(TASK.format(file=tmp_path / "task/local.jsonl"))
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu",
            "--model_args", f"pretrained={tmp_path / 'hf'},dtype=float32",
            "--tasks", "local_lines", "--include_path", tmp_path / "task",
            "--output_path", tmp_path / "out.json",
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = tmp_path.glob("out*.json")
    results = json.loads(file.read_text())["results"]["local_lines"]
    assert results["acc,none"] == pytest.approx(right / len(ITEMS))
