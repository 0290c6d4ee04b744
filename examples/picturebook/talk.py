"""The questions of `talk`, and the file that training reads; README.md has the commands around it.

python talk.py questions prompts.jsonl                      # questions of one line, without answers
python talk.py answers predictions.jsonl FOLDER TOKENIZER   # train.jsonl and dev.jsonl, of answers that ended
"""

import json
import random
import sys
from pathlib import Path

MOST = 94  # tokens of an answer that ended by itself, of 96 that were allowed

# fmt: off
THINGS = [
    "river", "bridge", "candle", "clock", "window", "garden", "teacher", "winter", "pencil", "mirror", "engine",
    "island", "forest", "market", "doctor", "violin", "bicycle", "umbrella", "library", "mountain", "kitchen",
    "station", "harbor", "blanket", "hammer", "pillow", "rocket", "desert", "novel", "lantern", "wallet", "statue",
    "carpet", "valley", "castle", "farmer", "bakery", "museum", "planet", "journey",
]
ANIMALS = [
    "elephant", "dolphin", "sparrow", "tiger", "rabbit", "spider", "penguin", "horse", "owl", "frog", "whale", "fox",
    "bee", "turtle", "camel",
]
ADJECTIVES = [
    "hot", "big", "early", "happy", "full", "strong", "easy", "near", "light", "soft", "loud", "rich", "young",
    "deep", "clean", "brave", "wide", "sharp", "dry", "fast", "safe", "open", "heavy", "true", "kind", "quiet",
    "thick", "new", "smooth", "cheap",
]
LANDS = [
    "France", "Italy", "Spain", "Japan", "Canada", "Egypt", "Brazil", "Kenya", "Norway", "Greece", "India", "China",
    "Australia", "Germany", "Mexico", "Peru", "Poland", "Turkey", "Portugal", "Sweden", "Cuba", "Chile", "Austria",
    "Hungary", "Ireland", "Finland", "Denmark", "Vietnam", "Thailand", "Morocco",
]
GROUPS = [
    "colors", "fruits", "vegetables", "animals that live in the sea", "planets", "sports", "musical instruments",
    "countries in Europe", "countries in Africa", "languages", "tools", "kinds of weather", "famous rivers", "metals",
    "trees", "birds", "things made of glass", "things found in a kitchen", "ways to travel", "jobs",
]
WORDS = [
    "water", "bread", "house", "friend", "morning", "thank you", "good night", "cat", "dog", "book", "red",
]
CHAT = [
    "Hello!", "Hi, how are you?", "Who are you?", "What can you do?", "Thank you for your help.", "Good morning!",
    "Tell me a joke.", "Can you help me with my homework?", "I am tired today.", "I feel sad.",
    "What should I eat for breakfast?", "Give me a tip for sleeping better.",
    "How can I learn faster? One tip, please.", "Say something nice.", "What is your favorite color?",
    "Are you a human?", "Goodbye!", "Recommend a hobby for rainy days.", "How do I boil an egg? Keep it short.",
    "What is a good name for a cat?", "Can you see pictures?", "Write a short greeting for a birthday card.",
    "Write a short email that thanks a colleague.", "Make this polite: Give me the report now.",
    "Make this polite: Be quiet.", "Correct this sentence: She go to school every day.",
    "Correct this sentence: I has two brother.", "Which day comes after Monday?", "Which month comes before June?",
    "How many days are there in a week?", "How many minutes are there in an hour?",
    "What is the freezing point of water in Celsius?", "Why is the sky blue? Answer in one sentence.",
    "Why do leaves fall in autumn? Answer in one sentence.", "What is photosynthesis? One sentence.",
    "What is gravity? One sentence.", "Who wrote Romeo and Juliet?", "Who painted the Mona Lisa?",
    "What is the largest ocean?", "What is the tallest mountain?", "Is the sun a star?", "Is ice heavier than water?",
    "What do plants need to grow?", 'What is the past tense of "go"?', 'What is the plural of "child"?',
    "Complete the sentence: The early bird", "Count from one to five.", 'Spell the word "banana".',
    'What rhymes with "cat"?', "Write a haiku about rain.",
    "Summarize in one sentence: The meeting was moved from Monday to Friday because the room was not free.",
    "Is this sentence happy or sad: I lost my keys again.", "Turn this into a question: You like tea.",
]
# fmt: on


def questions() -> list[dict[str, str]]:
    """Draw the questions; the same ones every time."""
    draw = random.Random(0)
    asked: list[tuple[str, str]] = []
    for _ in range(60):
        a, b = draw.randint(2, 60), draw.randint(2, 60)
        sums = [f"What is {a} + {b}?", f"Add {a} and {b}.", f"How much is {a} plus {b}?", f"What is {a + b} - {b}?"]
        asked.append(("sum", draw.choice([*sums, f"What is {a % 12 + 1} times {b % 10 + 1}?"])))
    for land in LANDS:
        kinds = [
            f"What is the capital of {land}?",
            f"Which city is the capital of {land}?",
            f"On which continent is {land}?",
        ]
        last = f"Which language do people speak in {land}? Answer in one sentence."
        asked.append(("fact", draw.choice([*kinds, last])))
    for word in ADJECTIVES:
        kinds = [f'What is the opposite of "{word}"?', f'Give a synonym for "{word}".']
        asked.append(("word", draw.choice([*kinds, f'Use the word "{word}" in a short sentence.'])))
    for thing in THINGS:
        kinds = [f"Explain in one sentence what a {thing} is.", f"Write one short sentence about a {thing}."]
        kinds += [f'Use the word "{thing}" in a sentence.', f"Write a two-line poem about a {thing}."]
        kinds += [f"What is a {thing} used for or known for? One sentence, please."]
        asked += [("line", text) for text in draw.sample(kinds, 4)]
    for animal in ANIMALS:
        kinds = [f"Where does a {animal} live? Answer in one sentence.", f"What does a {animal} eat?"]
        kinds += [f"Tell me one fact about a {animal}.", f"Is a {animal} a mammal? Say why in one sentence."]
        asked += [("line", text) for text in draw.sample(kinds, 3)]
    for group in GROUPS:
        more = draw.choice([f"Give me an example of {group}.", f"List five {group}, separated by commas."])
        asked += [("list", f"Name three {group}."), ("list", more)]
    for word in WORDS:
        both = [f'How do you say "{word}" in French?', f'Translate "{word}" to Spanish.']
        asked += [("translate", text) for text in both]
    asked += [("chat", text) for text in CHAT]
    draw.shuffle(asked)
    kind_of = {text: kind for kind, text in reversed(asked)}  # of questions that came twice, the first
    texts = list(dict.fromkeys(text for _, text in asked))
    return [{"id": f"talk-{i}", "kind": kind_of[t], "question": t, "answer": "-"} for i, t in enumerate(texts)]


def answers(predictions: Path, tokenizer: str) -> list[dict[str, str]]:
    """Return the questions with what the model answered, where it ended by itself."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    found = []
    for line in predictions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["prediction"].strip()
        if text and len(tokens(text)["input_ids"]) < MOST:
            found.append({"id": row["id"], "kind": row["kind"], "question": row["prompt"], "answer": text})
    return found


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    what, file = sys.argv[1], Path(sys.argv[2])
    if what == "questions":
        write(file, questions())
    else:
        rows, folder = answers(file, sys.argv[4]), Path(sys.argv[3])
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "dev.jsonl", rows[::8])
        write(folder / "train.jsonl", [row for i, row in enumerate(rows) if i % 8])
