import pytest

from diffjax.data.emoji_names import caption_of, concept_of, with_article


@pytest.mark.parametrize(
    ("emoji", "name", "phrase"),
    [
        ("🍎", ":red_apple:", "a red apple"),
        ("🦉", ":owl:", "an owl"),
        ("🍇", ":grapes:", "grapes"),
        ("⛸️", ":ice_skate:", "an ice skate"),
        ("🧊", ":ice:", "ice"),
        ("🦄", ":unicorn:", "a unicorn"),
        ("😒", ":unamused_face:", "an unamused face"),
        ("🐑", ":ewe:", "a ewe"),
        ("🆘", ":SOS_button:", "an SOS button"),
        ("🆚", ":VS_button:", "a VS button"),
        ("🆙", ":UP!_button:", "an UP! button"),
        ("🅱️", ":B_button_(blood_type):", "a B button (blood type)"),
        ("⌛", ":hourglass_done:", "an hourglass done"),
        ("🍯", ":honey_pot:", "a honey pot"),
        ("🚌", ":bus:", "a bus"),
        ("👗", ":dress:", "a dress"),
        ("👓", ":glasses:", "glasses"),
        ("🏋️‍♂️", ":man_lifting_weights:", "a man lifting weights"),
        ("👬", ":men_holding_hands:", "men holding hands"),
        ("👍", ":thumbs_up:", "thumbs up"),
        ("🎅", ":Santa_Claus:", "Santa Claus"),
        ("🗽", ":Statue_of_Liberty:", "the Statue of Liberty"),
        ("☀️", ":sun:", "the sun"),
        ("🇯🇵", ":Japan:", "the flag of Japan"),
        ("🇧🇸", ":Bahamas:", "the flag of the Bahamas"),
        ("🇫🇷", ":France:", "the flag of France"),
        ("🇬🇧", ":United_Kingdom:", "the flag of the United Kingdom"),
        (
            "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
            ":Scotland:",
            "the flag of Scotland",
        ),
        ("🏴‍☠️", ":pirate_flag:", "a pirate flag"),
        ("5️⃣", ":keycap_5:", "the keycap 5"),
        ("♈", ":Aries:", "the zodiac sign Aries"),
        ("🕗", ":eight_o’clock:", "a clock showing eight o'clock"),
        ("👨‍🦰", ":man_red_hair:", "a man with red hair"),
        ("👩‍🦲", ":woman_bald:", "a bald woman"),
        ("👨‍👩‍👦", ":family_man_woman_boy:", "a family of a man, a woman and a boy"),
        ("💋", ":kiss_mark:", "a kiss mark"),
        ("🚭", ":no_smoking:", "a no smoking sign"),
        ("🔒", ":locked:", "a closed padlock"),
    ],
)
def test_phrase(emoji, name, phrase):
    assert with_article(concept_of(emoji, name)) == phrase


def test_the_style_has_its_own_article():
    assert caption_of("openmoji", "red apple") == "an openmoji of a red apple"
    assert caption_of("twemoji", "owl") == "a twemoji of an owl"
