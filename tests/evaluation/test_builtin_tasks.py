"""The sentence benchmarks made from held-out text."""

from scratch_gpt.evaluation.builtin_tasks import make_questions, split_sentences


def test_sentences_end_at_punctuation_or_line_breaks():
    assert split_sentences(['"Who?" she said. Mr. B! Yes\nCHAPTER 1\n']) == [
        '"Who?"',
        "she said.",
        "Mr.",
        "B!",
        "Yes",
        "CHAPTER 1",
    ]


def test_the_answer_of_a_question_is_the_sentence_of_the_text(held_out):
    sentences = split_sentences(held_out)
    tasks = make_questions(held_out, limit=50, seed=0)
    assert {name: len(questions) for name, questions in tasks.items()} == {"next_sentence": 50, "word_order": 50}
    for question in tasks["next_sentence"]:
        answer = question.choices[question.answer]
        index = next(i for i, s in enumerate(sentences) if s == answer and question.context.endswith(sentences[i - 1]))
        assert question.context == " ".join(sentences[max(0, index - 3) : index])
        assert len(set(question.choices)) == 4
    for question in tasks["word_order"]:
        assert question.choices[question.answer] in sentences
        assert sorted(question.choices[0].split(" ")) == sorted(question.choices[1].split(" "))
    answers = [question.answer for question in tasks["next_sentence"]]
    assert {0, 1, 2, 3} == set(answers)


def test_the_seed_decides_the_questions(held_out):
    assert make_questions(held_out, 20, seed=1) == make_questions(held_out, 20, seed=1)
    assert make_questions(held_out, 20, seed=1) != make_questions(held_out, 20, seed=2)


def test_too_little_text_makes_no_make_questions():
    assert make_questions(["Only one sentence of some length stands here."], 20, seed=0) == {}
