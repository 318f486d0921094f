"""Answers a question from a text of any length with an exported student, without torch and transformers.

python answer_on_device.py EXPORT_DIR "who came?" "the red car came" [NO_ANSWER_THRESHOLD]

Prints the five best answers with their probabilities, the best first. As in evaluation, the search covers the
20 best starts and ends of each of several overlapping windows. With a threshold, it prints "no answer" if
the score of [CLS], which stands for no answer, exceeds the best answer's score by more than the threshold.
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

WINDOW, N_BEST, MAX_TOKENS, SHOWN = 384, 20, 30, 5


def windows(tokenizer: Tokenizer, question: str, context: str, length: int) -> list[Encoding]:
    """Returns rows of at most ``length`` tokens that cover the context; neighbours share up to 128 tokens."""
    tokenizer.no_truncation()
    question = question.lstrip()
    asked = tokenizer.encode(question, add_special_tokens=False)
    limit = min(64, length // 4)
    if len(asked) > limit:  # leaves room for the context
        question = question[: asked.offsets[limit - 1][1]]
    tokenizer.enable_truncation(length, stride=min(128, length // 3), strategy="only_second")
    row = tokenizer.encode(question, context)
    return [row, *row.overflowing]


def spans(row: Encoding, start: np.ndarray, end: np.ndarray) -> list[tuple[float, int, int]]:
    """Returns a window's candidates as (score, first character, last character + 1).

    start, end: logits, float32 [L].
    """
    inside = np.array([token for token, part in enumerate(row.sequence_ids) if part == 1], np.int64)
    starts = inside[np.argsort(-start[inside], kind="stable")[:N_BEST]]
    ends = inside[np.argsort(-end[inside], kind="stable")[:N_BEST]]
    return [
        (float(start[first] + end[last]), row.offsets[first][0], row.offsets[last][1])
        for first in starts
        for last in ends
        if 0 <= last - first < MAX_TOKENS
    ]


def main(directory: str, question: str, context: str, threshold: str = "inf") -> None:
    with open(f"{directory}/export.json") as file:
        export = json.load(file)
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is ordinary text
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(f"{directory}/model.int8.onnx", options)
    candidates, starts, ends, no_answer = [], [], [], np.inf
    for row in windows(tokenizer, question, context, min(WINDOW, export["max_length"])):
        arrays = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
        inputs = {name: np.array([arrays[name]], np.int64) for name in export["inputs"]}
        start, end = (logits[0] for logits in session.run(["start_logits", "end_logits"], inputs))
        candidates += spans(row, start, end)
        starts.append(start)
        ends.append(end)
        no_answer = min(no_answer, float(start[0] + end[0]))
    normaliser = sum(np.logaddexp.reduce(np.concatenate(logits)) for logits in (starts, ends))
    candidates.sort(key=lambda candidate: -candidate[0])
    if not candidates or no_answer - candidates[0][0] > float(threshold):
        print("no answer")
        return
    for characters in list(dict.fromkeys(candidate[1:] for candidate in candidates))[:SHOWN]:
        score = next(candidate[0] for candidate in candidates if candidate[1:] == characters)
        print(f"{np.exp(score - normaliser):.4f}\t{context[slice(*characters)]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
