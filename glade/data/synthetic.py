"""A seeded generator of short children's stories, so that there is text where nothing is installed and no network is.

Every sentence in here was written for glade and is dedicated to the public domain (CC0). Story `i` of a seed is a
function of (seed, i) alone, the same on every machine. A story has a hero, a helper, a place and one of a few plots;
names, things and pronouns stay the same through it, which is what a small language model can learn from it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MASK = (1 << 64) - 1


class _Random:
    """SplitMix64. Python's own generator promises no sameness of `choice` between versions."""

    def __init__(self, seed: int, stream: int) -> None:
        self._state = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + 1) & _MASK
        self.below(2)

    def below(self, limit: int) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) >> 11) % limit

    def choice(self, options: Sequence):
        return options[self.below(len(options))]


def _words(listed: str) -> list[str]:
    return listed.split("|")


_GIRLS = _words(
    "Anna|Bella|Clara|Daisy|Ella|Fiona|Grace|Hazel|Ivy|Julia|Katie|Luna|Mia|Nora|Olive|Poppy|Rosa|Sara|Tess|Zoe"
)
_BOYS = _words("Adam|Ben|Carl|Dan|Eli|Finn|George|Hugo|Ian|Jack|Kai|Leo|Max|Noah|Oscar|Pete|Ravi|Sam|Tom|Will")
_ANIMALS = _words("fox|rabbit|bear|mouse|duck|frog|squirrel|hedgehog|owl|goat|kitten|puppy|otter|badger|lamb|sparrow")
_PLACES = (
    ("a village by the sea", "the beach"),
    ("a small house near the forest", "the edge of the forest"),
    ("a farmhouse on a green hill", "the meadow"),
    ("a town with a big bridge", "the river"),
    ("a cottage beside a lake", "the lake"),
    ("a narrow street full of trees", "the park"),
    ("a tall house with a red roof", "the garden"),
    ("a valley between two mountains", "the old mill"),
)
_THINGS = _words(
    "red ball|blue kite|wooden boat|little drum|silver bell|yellow hat|warm scarf|toy train|"
    "shiny button|round stone|paper crown|green cup|soft blanket|tin whistle|glass marble|brown bag"
)
_FOODS = _words("apple|pear|honey cake|loaf of bread|plum|bowl of soup|carrot|biscuit|slice of cheese|pancake")
_MOODS = _words("kind|brave|curious|quiet|cheerful|clever|shy|busy|gentle|stubborn")
_WEATHERS = (
    "The sun was warm and the sky was blue.",
    "A cold wind blew from the north.",
    "Soft rain fell on the roofs.",
    "White snow lay on the ground.",
    "The morning was grey and still.",
    "The leaves were turning gold.",
    "Birds sang in every tree.",
    "Fog hung low over the fields.",
)
_HIDING = (
    "under a bush",
    "behind a big rock",
    "in the tall grass",
    "up in a tree",
    "inside a hollow log",
    "beside the path",
)
_GREETINGS = ("Hello", "Good morning", "Good day", "Hi there")
_OPENINGS = (
    "Once upon a time, there was a {mood} {kind} named {hero}. {He} lived in {home}.",
    "In {home} lived a {kind} named {hero}. {He} was very {mood}.",
    "{hero} was a {mood} {kind} who lived in {home}.",
    "There once lived in {home} a {kind} whose name was {hero}. Everyone said that {he} was {mood}.",
)
_ENDINGS = (
    "That night {hero} slept very well.",
    "And they stayed friends for a long, long time.",
    "From that day on, {hero} and {friend} met every morning at {place}.",
    "{hero} went home and told {his} mother the whole story.",
    "They laughed all the way home.",
    "And that was the best day of the year.",
)
_ASIDES = (
    "A stranger watched them from far away.",
    "Somewhere a dog barked.",
    '"What a day!" said {friend}.',
    "{hero} counted slowly to ten.",
    "They walked along {place} side by side.",
    "The clouds moved slowly over {place}.",
    "{hero} hummed a little song.",
    "{friend} looked at {hero} and smiled.",
    "They shared a {food}.",
)


class _Plot(NamedTuple):
    """Beats in order, each in a few wordings, and the moral."""

    beats: list[list[str]]
    moral: str


# One line a beat, "/" another wording of it, "=" the moral.
_SCRIPT = """\
One day, {hero} could not find {his} {thing}.
/ One morning, the {thing} of {hero} was gone.
{He} looked in the house, but it was not there.
/ {He} looked under the bed and behind the door.
"{greeting}," said {friend} the {other}. "Why are you so sad?"
/ {friend} the {other} came by and asked, "What is wrong?"
"I have lost my {thing}," said {hero}.
/ "My {thing} is gone," {hero} said, and began to cry.
"Let us look for it together," said {friend}.
/ "Two can look better than one," said {friend}.
They went to {place}, and there, {hiding}, lay the {thing}.
/ At {place} they found the {thing} {hiding}.
"Thank you, {friend}!" said {hero}.
/ {hero} hugged {friend} and danced with joy.
= A friend makes every search shorter.

{hero} had one {food} for lunch.
/ One day, {his} mother gave {hero} a {food}.
On the way to {place}, {he} met {friend}, a hungry {other}.
/ At {place} sat a {other} named {friend}, thin and hungry.
"{greeting}," said {friend}. "I have eaten nothing today."
/ "Please, may I have a bite?" asked {friend}.
{hero} was hungry too, and {he} thought for a moment.
/ {hero} looked at the {food}. It smelled so good.
Then {he} broke the {food} in two and gave one half to {friend}.
/ "Here," said {hero}, "half is for you."
The next day, {friend} brought {hero} a {thing}.
/ A week later, {hero} found a {thing} at the door. It was from {friend}.
"You shared with me," said {friend}, "so I share with you."
/ "This is for your kind heart," said {friend}.
= What we share comes back to us.

{hero} wanted to cross the water at {place}, but {he} was afraid.
/ {hero} had never dared to climb the hill behind {place}.
"I am too small," {he} said.
/ "What if I fall?" {he} asked.
One day {he} heard a cry. It was {friend} the {other}, who was stuck {hiding}.
/ Then a voice called for help. {friend} the {other} was caught {hiding}.
There was no one else near.
/ Nobody else heard the cry.
{hero} took a deep breath and ran to help.
/ {hero} forgot {his} fear and went.
{He} pulled and pulled, until {friend} was free.
/ With the help of a {thing}, {he} got {friend} out.
"You are the bravest {kind} I know," said {friend}.
/ "You came!" said {friend}. "You were not too small at all."
= To be brave is to be afraid and go on.

{hero} was playing with the {thing} of {friend} the {other}.
/ One day {friend} the {other} lent {hero} a {thing}.
It slipped and broke in two.
/ {He} dropped it on a stone, and it broke.
{hero} hid the pieces {hiding}.
/ Nobody had seen it. {hero} put the pieces away {hiding}.
"Where is my {thing}?" asked {friend}.
/ Later {friend} came and looked for the {thing}.
{hero} felt hot and cold.
/ {hero} looked at the ground and said nothing at first.
"I broke it," said {hero} at last. "I am sorry."
/ "It was me," {hero} whispered. "I am so sorry."
"I am glad you told me," said {friend}. "We can mend it."
/ {friend} was sad, but not angry, and together they mended it.
= The truth is hard to say and easy to keep.

In spring, {hero} put a seed into the ground near {place}.
/ {hero} found a seed {hiding} and planted it.
Every day {he} gave it water.
/ Each morning {he} brought it a little water.
A week went by, and nothing grew.
/ Many days passed. There was only brown earth.
"Give up," said {friend} the {other}. "It is only a stone."
/ {friend} the {other} laughed. "Nothing will ever grow there."
But {hero} waited and went on.
/ "I will wait," said {hero}.
Then, one morning, there was a small green leaf.
/ After the next rain, a green tip came out of the ground.
In summer it was taller than {friend}, and it was full of flowers.
/ "I was wrong," said {friend}, and sat down in its shade.
= Good things grow slowly.

There was to be a race around {place}.
/ "Let us race around {place}," said {friend} the {other}.
{friend} the {other} was the fastest of all, and said so to everyone.
/ "I always win," said {friend}, who was a very fast {other}.
{hero} was slow, but {he} practised every day.
/ {hero} ran a little every evening, even in the rain.
On the day of the race, {friend} was far ahead and stopped to eat a {food}.
/ When the race began, {friend} ran off, then lay down to sleep {hiding}.
{hero} did not stop.
/ Step by step, {hero} went on.
When {friend} looked up, {hero} was already at the end.
/ "Wait!" cried {friend}, but {hero} had won.
{hero} won the {thing} and let {friend} hold it too.
/ The prize was a {thing}, and {hero} was very proud.
= Steady feet go far.

A new neighbour came to live near {place}. It was {friend} the {other}.
/ One day a {other} named {friend} moved in beside {place}.
Nobody spoke to {friend}, because {friend} looked different.
/ The others did not play with {friend}.
{hero} saw {friend} sitting alone {hiding}.
/ {hero} noticed that {friend} was alone every day.
"{greeting}," said {hero}. "Would you like to play with my {thing}?"
/ {hero} went over with a {thing} and said, "Come and play."
{friend} smiled for the first time.
/ "With me?" asked {friend}. "Yes, please!"
{friend} knew a game that no one had ever played.
/ It turned out that {friend} could tell the funniest stories.
Soon everyone wanted to join in.
/ By evening all the children stood around them.
= Every friend was a stranger once.

A great storm came over {place}.
/ One evening, the wind began to roar around {place}.
{hero} heard a knock. It was {friend} the {other}, wet and cold.
/ At the door stood {friend}, a {other}, shaking with cold.
"My home is broken," said {friend}.
/ "The wind took my roof," {friend} said.
"Come in," said {hero}, and gave {friend} a {food}.
/ {hero} let {friend} in and made a fire.
All night they listened to the rain and told stories.
/ They sat by the fire until the storm was over.
In the morning they built a new home for {friend}.
/ The next day {hero} helped to mend the roof.
{friend} hung a {thing} over the door, to remember.
/ On the wall {friend} put a {thing}. "It is from my best friend," said {friend}.
= A shared roof keeps out every storm.
"""


def _read_plot(script: str) -> _Plot:
    *lines, moral = script.strip().split("\n")
    beats: list[list[str]] = []
    for line in lines:
        if line.startswith("/ "):
            beats[-1].append(line[2:])
        else:
            beats.append([line])
    return _Plot(beats, moral.removeprefix("= "))


_PLOTS = tuple(_read_plot(script) for script in _SCRIPT.split("\n\n"))


def story(index: int, seed: int = 0) -> str:
    """Story number `index` of a seed: three short paragraphs, each on one line."""
    random = _Random(seed, index)
    girl, animal = random.below(2), random.below(3) == 0
    names = _GIRLS if girl else _BOYS
    home, place = random.choice(_PLACES)
    hero = random.choice(names)
    words = {
        "hero": hero,
        "friend": random.choice([n for n in _GIRLS + _BOYS if n != hero]),
        "kind": random.choice(_ANIMALS) if animal else ("girl" if girl else "boy"),
        "he": "she" if girl else "he",
        "He": "She" if girl else "He",
        "his": "her" if girl else "his",
        "home": home,
        "place": place,
        "thing": random.choice(_THINGS),
        "food": random.choice(_FOODS),
        "mood": random.choice(_MOODS),
        "hiding": random.choice(_HIDING),
        "greeting": random.choice(_GREETINGS),
    }
    words["other"] = random.choice([a for a in _ANIMALS if a != words["kind"]])
    plot = random.choice(_PLOTS)
    opening = [random.choice(_OPENINGS)]
    if random.below(2):
        opening.append(random.choice(_WEATHERS))
    beats: list[str] = []
    for beat in plot.beats:
        beats.append(random.choice(beat))
        # {friend} is known to the reader only once the plot has brought {friend} in
        if "{friend}" in " ".join(beats) and random.below(4) == 0:
            beats.append(random.choice(_ASIDES))
    ending = [random.choice(_ENDINGS)]
    if random.below(3):
        ending.append("The moral of the story: " + plot.moral[0].lower() + plot.moral[1:])
    text = "\n".join(" ".join(part) for part in (opening, beats, ending)).format(**words)
    return _with_articles(text)


def _with_articles(text: str) -> str:
    """ "a owl" as "an owl": the templates write "a" before every slot."""
    words = text.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "A") and words[i + 1][:1] in "aeio":
            words[i] += "n"
    return " ".join(words)


def stories(num: int, seed: int = 0) -> Iterator[str]:
    """The first `num` stories of a seed.

    Args:
        num: how many stories; none for 0.
        seed: another seed gives other stories.
    """
    return (story(index, seed) for index in range(num))
