"""Truncation: which turns and tokens of a conversation that is too long are cut off."""

from tests.commands.prepare.ids import SYSTEM, Prepared, decode, encode, fastchat_text, load_tokenizer_of, record


def test_truncation_drops_the_oldest_turns_and_keeps_the_system(prepared: Prepared) -> None:
    texts = [f"{'water ' * (number % 5 + 1)}{number}" for number in range(12)]
    limit = 150
    result, cache = prepared(record(*texts, system="Be brief."), model_max_length=limit)
    tokenizer = load_tokenizer_of(cache)
    system = encode(tokenizer, "Be brief.\n\n")
    cut = 0
    for number, example in enumerate(cache):
        answer = 2 * number + 1
        names = ["### Human: ", "### Assistant: "]
        turns = [names[index % 2] + text + "\n" for index, text in enumerate(texts[:answer])]
        # as few of the oldest turns as possible are dropped
        for dropped in range(answer):
            kept = "Be brief.\n\n" + "".join(turns[dropped:]) + "### Assistant:"
            if len(encode(tokenizer, kept)) + 1 <= limit:
                break
        assert decode(tokenizer, example.source_S) == kept
        assert example.source_S[: len(system)].tolist() == system
        assert decode(tokenizer, example.target_T) == texts[answer] + "\n"
        cut += dropped > 0
    assert 0 < cut < len(cache)
    assert result.truncated_sources == cut
    assert result.truncated_targets == 0


def test_a_single_too_long_human_turn_loses_its_start(prepared: Prepared) -> None:
    question = " ".join(str(number) for number in range(200))
    result, cache = prepared(record("Hi", "Yes", question, "No", system="Be brief."), model_max_length=64)
    tokenizer = load_tokenizer_of(cache)
    system = encode(tokenizer, "Be brief.\n\n")
    whole = encode(tokenizer, fastchat_text(["Hi", "Yes", question], "Be brief.") + "### Assistant:")
    expected = [*system, *whole[-(63 - len(system)) :], tokenizer.eos_token_id]
    assert cache[1].source_S.tolist() == expected
    assert len(expected) == 64
    assert result.truncated_sources == 1


def test_a_too_long_system_line_leaves_room_for_text(prepared: Prepared) -> None:
    _, cache = prepared(record("Where is Mira?", "Here"), model_max_length=40)
    assert len(cache[0].source_S) == 40
    assert decode(load_tokenizer_of(cache), cache[0].source_S).endswith("Mira?\n### Assistant:")


def test_a_truncated_target_has_no_end_token(prepared: Prepared) -> None:
    answer = " ".join(str(number) for number in range(200))
    result, cache = prepared(record("Count.", answer, "Thanks", "Yes"), model_max_length=64)
    tokenizer = load_tokenizer_of(cache)
    whole = encode(tokenizer, fastchat_text(["Count.", answer]))
    before = len(encode(tokenizer, fastchat_text(["Count."]) + "### Assistant:"))
    assert cache[0].target_T.tolist() == whole[before : before + 64]
    assert tokenizer.eos_token_id not in cache[0].target_T
    assert cache[1].target_T[-1] == tokenizer.eos_token_id
    assert result.truncated_targets == 1


def test_a_target_that_just_fits_keeps_its_end_token(prepared: Prepared) -> None:
    # in pocket's vocabulary " 1", then each further digit, and the newline are a token each
    for digits, whole in ((8, True), (32, True), (33, True), (34, False), (40, False)):
        answer = "7" * digits
        result, cache = prepared(record("Count.", answer), model_max_length=36)
        length = len(encode(load_tokenizer_of(cache), answer + "\n"))
        assert (length + 1 <= 36) is whole, "check of this test's own arithmetic"
        assert len(cache[0].target_T) == (length + 1 if whole else 36)
        assert result.truncated_targets == (not whole)


def test_a_long_conversation_gives_every_target_with_its_own_source(prepared: Prepared) -> None:
    texts = [f"{'question' if number % 2 == 0 else 'answer'} {number}\n  {{{number}}}" for number in range(400)]
    result, cache = prepared(record(*texts), model_max_length=256)
    assert result.examples == 200
    tokenizer = load_tokenizer_of(cache)
    for number, example in enumerate(cache):
        assert decode(tokenizer, example.target_T) == texts[2 * number + 1] + "\n"
        source = decode(tokenizer, example.source_S)
        assert source.startswith(SYSTEM[:20])
        assert source.endswith(f"### Human: {texts[2 * number]}\n### Assistant:")
        assert len(example.source_S) <= 256
