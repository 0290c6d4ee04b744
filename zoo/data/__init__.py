"""Data sets: records in, samples out. One line per component."""

from zoo.registry import declare

declare("dataset", "chat_json", "zoo.data.chat_json")
declare("dataset", "classes", "zoo.data.classes")
declare("dataset", "hf", "zoo.data.hf_hub")
declare("dataset", "nlvr", "zoo.data.nlvr")
declare("dataset", "preference", "zoo.data.preference")
declare("dataset", "retrieval", "zoo.data.retrieval")
declare("dataset", "scenes", "zoo.data.scenes")
declare("dataset", "table", "zoo.data.table")
declare("dataset", "webdataset", "zoo.data.webdataset")
