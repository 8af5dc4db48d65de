"""The data sets of an axolotl config as the data section of a stage."""

from __future__ import annotations

from pipeline.bring import columns
from pipeline.bring.words import Words
from pipeline.disk.atomic import Json

PEER = "axolotl"
LOSS = "is decided here: all that the assistant says carries loss"
DATA_REASONS = {
    "ds_type": "is told by the file's ending",
    "name": "is one of several parts of a data set on the Hub: download it and name the files",
    "revision": "is not named here: a run keeps to the commit that it first reads",
    "trust_remote_code": "is not offered: no code of a data set's is run",
    "chat_template": "is the base's own here, for all stages: model.chat_template",
    "shards": "is not offered; `limit` takes the first rows",
    **dict.fromkeys(("roles_to_train", "train_on_eos", "message_field_training"), LOSS),
}
FORMATS = {
    "alpaca": "alpaca", "alpaca_chat.load_qa": "qa", "sharegpt": "sharegpt", "completion": "trl", "pretrain": "trl",
    "gpteacher": "dolly", "alpaca_chat": "dolly", "context_qa.load_v2": "qa", "oasst": None,
    "intel": "qa", "argilla_chat": "hh", "prompt_pairs": "trl", "ultra": "trl",
}  # fmt: skip
"""By its `type`; of DPO by what comes after the template's name and a dot."""


def take(words: Words, labelled: bool) -> tuple[Json, bool]:
    """The data section, and whether its rows are documents. `labelled`: rows of KTO, whose keys tell what they are."""
    documents = words.sections("pretraining_dataset")
    sources = words.sections("datasets") or documents
    parts, kinds = [], set()
    for source in sources:
        part, is_text = _part(source)
        parts.append({**part, "format": "kto"} if labelled else part)
        kinds.add(is_text or source in documents)
    if not parts:
        words.leave("datasets", "is missing: name the rows as data.path")
        parts = [{"path": "DATA"}]
    data: Json = dict(parts[0]) if len(parts) == 1 else {"mix": parts}
    if share := words.number("val_set_size"):
        data["test"] = share
    for number, source in enumerate(words.sections("test_datasets")):
        part, _ = _part(source)
        if number:
            source.leave("path", "is a second held-out file; a stage has one", part["path"])
        else:
            data["test"] = part["path"]
    return data, kinds == {True}


def _part(source: Words) -> tuple[Json, bool]:
    path, files = source.text("path"), source.texts("data_files")
    if files and path in ("json", "csv", "parquet", "text"):
        path = files[0]
        files = files[1:]
    if files:
        source.leave("data_files", "names files of a data set: name each as an entry of `mix`", files)
    part: Json = {"path": path or "DATA"}
    if (split := source.text("split", "train")) != "train":
        part["split"] = split
    if isinstance(source.rest.get("type"), dict):
        found, is_text = _format_of_fields(source.sections("type")[0]), False
    else:
        found, is_text = _format(source, source.text("type"))
    if found:
        part["format"] = found
    source.leave_all(DATA_REASONS)
    source.leave_rest(PEER)
    return part, is_text


def _format(source: Words, form: str) -> tuple[str | None, bool]:
    """By its `type`; None to have it told by the rows."""
    is_text = form in ("completion", "pretrain")
    text = source.text("field", "text") if is_text else source.text("text_column", "text")
    if text != "text":
        source.leave("field", "is another column than `text`: rename it", text)
    name = form.partition(":")[0]
    if name.startswith("chat_template"):
        return _format_of_turns(source, "messages"), False
    found = FORMATS.get(name, FORMATS.get(name.rpartition(".")[2], ""))
    if found == "" and form:
        source.leave("type", "has no counterpart: the format is told by the rows' keys, or refused", form)
    return found or None, is_text


def _format_of_turns(source: Words, column: str) -> str | None:
    column = source.text("field_messages", column)
    keys = {
        "role": source.text("message_field_role", "role"),
        "content": source.text("message_field_content", "content"),
    }
    for mapping in source.sections("message_property_mappings"):
        keys = {use: mapping.text(use, key) for use, key in keys.items()}
        mapping.leave_rest(PEER)
    for word, expected in (("field_chosen", "chosen"), ("field_rejected", "rejected")):
        if (said := source.text(word, expected)) != expected:
            source.leave(word, f"is another column than `{expected}`: rename it", said)
    if said := source.take("roles"):
        source.leave("roles", "is told by the usual names of who speaks", said)
    found = columns.format_of_dialogues(column, keys["role"], keys["content"])
    if found is None:
        told = f"calls the turns '{column}', '{keys['role']}', '{keys['content']}'"
        source.leave("field_messages", f"{told}: rename them as sharegpt or openai have them", column)
    return found


def _format_of_fields(fields: Words) -> str | None:
    """Of rows whose columns it names itself."""
    uses = {
        "field_instruction": "prompt", "field_prompt": "prompt", "field_input": "query", "field_output": "response",
        "field_completion": "response", "field_system": "system", "field_chosen": "chosen",
        "field_rejected": "rejected",
    }  # fmt: skip
    given = {use: name for word, use in uses.items() if (name := fields.text(word))}
    for word in list(fields.rest):
        fields.leave(word, "is written by the base's chat template here")
    found = columns.format_of(given)
    if found is None:
        fields.leave("field_*", f"is in none of our formats ({columns.told(given)}): rename the columns", given)
    return found
