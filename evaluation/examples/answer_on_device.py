"""Answer a question from a text of any length with an exported student: no torch, no transformers.

python answer_on_device.py EXPORT_DIR "who came?" "the red car came" [NO_ANSWER_THRESHOLD]

Prints the five best answers with their probabilities, best first, found as in evaluation: in windows that
overlap, among the 20 best starts and ends of each. With a threshold, it prints "no answer" where the score of
[CLS], which stands for no answer, is above the best answer's by more than that.
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

WINDOW, N_BEST, MAX_TOKENS, SHOWN = 384, 20, 30, 5


def windows(tokenizer: Tokenizer, question: str, context: str, length: int) -> list[Encoding]:
    """Rows of at most ``length`` tokens that share a third of them, at most 128, with their neighbours."""
    tokenizer.no_truncation()
    question = question.lstrip()
    asked = tokenizer.encode(question, add_special_tokens=False)
    limit = min(64, length // 4)
    if len(asked) > limit:  # the text always has room
        question = question[: asked.offsets[limit - 1][1]]
    tokenizer.enable_truncation(length, stride=min(128, length // 3), strategy="only_second")
    row = tokenizer.encode(question, context)
    return [row, *row.overflowing]


def spans(row: Encoding, start: np.ndarray, end: np.ndarray) -> list[tuple[float, int, int]]:
    """(score, first character, last character + 1) of a window's candidates. start, end: float32 [L]."""
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
        about = json.load(file)
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    tokenizer.encode_special_tokens = True  # a text that spells [SEP] does not end there
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(f"{directory}/model.int8.onnx", options)
    found, starts, ends, nothing = [], [], [], np.inf
    for row in windows(tokenizer, question, context, min(WINDOW, about["max_length"])):
        arrays = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
        inputs = {name: np.array([arrays[name]], np.int64) for name in about["inputs"]}
        start, end = (logits[0] for logits in session.run(["start_logits", "end_logits"], inputs))
        found += spans(row, start, end)
        starts.append(start)
        ends.append(end)
        nothing = min(nothing, float(start[0] + end[0]))
    whole = sum(np.logaddexp.reduce(np.concatenate(logits)) for logits in (starts, ends))
    found.sort(key=lambda span: -span[0])
    if not found or nothing - found[0][0] > float(threshold):
        print("no answer")
        return
    for place in list(dict.fromkeys(span[1:] for span in found))[:SHOWN]:
        score = next(span[0] for span in found if span[1:] == place)
        print(f"{np.exp(score - whole):.4f}\t{context[slice(*place)]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
