"""The vocabulary of the built-in model's pretraining tasks.

Words of the fine-tuning tasks are left out, except a few everyday words: nothing here is served at a counter, breaks in
a flat or is announced at a platform.
"""

import random
from collections.abc import Callable

NAMES = """Ada Alma Amir Anton Anna Arne Aron Asha Bela Bert Bruno Cara Carl Chen Clara Dana Daniel Dora Edith Elif
Elsa Emil Emma Enzo Erik Eva Felix Fiona Frank Frida Gina Goran Greta Hana Hasan Hugo Ida Igor Ilse Irma
Ivan Jana Jens Joel Judith Julia Kai Karin Kenji Lara Laura Leo Lia Lukas Maja Marco Maria Mark Marta
Mehdi Mina Mona Nadia Nils Nina Noah Olga Oscar Otto Paul Petra Pia Rafael Rita Robin Rosa Sam Sara Simon
Sofia Sven Tara Tina Ugo Ursula Vera Victor Walter Wanda Yara Yusuf Zoe""".split()

PLACES = """Athens Basel Bergen Berlin Bonn Boston Bremen Cairo Cardiff Cork Delhi Dublin Faro Geneva Ghent Graz Hanoi
Kiel Kyoto Lagos Leeds Lima Linz Lisbon London Lyon Madrid Malmo Milan Munich Nairobi Naples Nice Oslo
Ottawa Paris Porto Prague Quito Riga Rome Salem Seoul Sofia Split Tallinn Tampa Tokyo Trier Turin Vienna
Warsaw York Zagreb""".split()

# singular and plural
THINGS = [
    tuple(pair.split("/"))
    for pair in """anchor/anchors bag/bags ball/balls basket/baskets bell/bells belt/belts bench/benches bike/bikes
    blanket/blankets boat/boats book/books boot/boots bottle/bottles bowl/bowls box/boxes brick/bricks brush/brushes
    bucket/buckets button/buttons camera/cameras candle/candles cap/caps card/cards carpet/carpets chain/chains
    chair/chairs clock/clocks coat/coats coin/coins comb/combs cup/cups curtain/curtains desk/desks drum/drums
    envelope/envelopes fan/fans file/files flag/flags flute/flutes folder/folders glove/gloves guitar/guitars
    hammer/hammers hat/hats helmet/helmets hook/hooks jacket/jackets jar/jars kettle/kettles key/keys kite/kites
    ladder/ladders lamp/lamps leaf/leaves letter/letters magnet/magnets map/maps mask/masks mat/mats mirror/mirrors
    mug/mugs nail/nails needle/needles net/nets notebook/notebooks pen/pens pencil/pencils photo/photos piano/pianos
    pillow/pillows pin/pins pipe/pipes plank/planks plant/plants plate/plates pot/pots printer/printers puzzle/puzzles
    rake/rakes ribbon/ribbons ring/rings rope/ropes rug/rugs ruler/rulers saw/saws scarf/scarves shelf/shelves
    shirt/shirts shoe/shoes shovel/shovels sock/socks spoon/spoons stamp/stamps stick/sticks stone/stones stool/stools
    suitcase/suitcases table/tables tent/tents ticket/tickets tile/tiles torch/torches towel/towels tray/trays
    tube/tubes umbrella/umbrellas vase/vases violin/violins wagon/wagons wallet/wallets watch/watches wheel/wheels
    whistle/whistles wire/wires""".split()
]

ANIMALS = """ant badger bat bear bee bird camel cat cow crab crow deer dog duck eagle fox frog goat goose hare hen horse
lion lizard mole monkey mouse otter owl parrot pig pony rabbit rat robin seal shark sheep snail snake spider swan tiger
toad turtle whale wolf worm""".split()

COLOURS = "amber beige black blue brown golden green grey orange pink purple red silver violet white yellow".split()
SIZES = (
    "big broad deep flat heavy high huge large light little long narrow short small tall thick thin tiny wide".split()
)
QUALITIES = """angry brave bright busy calm careful clean clever cold cool dark dirty dry dull empty fair famous fast
fine fresh friendly full funny gentle happy hard honest hot kind late lazy loud lucky new noisy old open plain polite
poor proud quick quiet rare ready rich rough rude sad safe sharp shy simple slow smooth soft sour strong sweet tidy
tired warm weak wet wild wise young""".split()

# infinitive, past, with an object
VERBS = [
    tuple(pair.split("/"))
    for pair in """bring/brought build/built buy/bought carry/carried check/checked clean/cleaned close/closed
    collect/collected count/counted draw/drew drop/dropped fetch/fetched find/found fix/fixed fold/folded get/got
    hide/hid hold/held keep/kept leave/left lift/lifted lock/locked lose/lost make/made mend/mended move/moved
    open/opened order/ordered pack/packed paint/painted pick/picked pull/pulled push/pushed read/read repair/repaired
    return/returned save/saved sell/sold send/sent show/showed store/stored take/took throw/threw use/used wash/washed
    watch/watched weigh/weighed wrap/wrapped""".split()
]

JOBS = """actor baker builder captain carpenter clerk coach cook dentist doctor driver editor engineer farmer gardener
guard hunter judge lawyer miner nurse painter pilot plumber poet porter sailor singer soldier student tailor teacher
waiter weaver writer""".split()
ROOMS = """attic barn basement bathroom bedroom cabin cellar garage garden hall kitchen library office park school shed
shop stable station street studio tower yard""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November December""".split()
HABITS = [
    "swim",
    "sing",
    "dance",
    "ski",
    "cook",
    "run",
    "paint",
    "sail",
    "climb",
    "write",
    "ride",
    "fish",
    "draw",
    "skate",
]
# everyday words that the tasks don't use, but that the tokenizer should split into few pieces
ENGLISH = """a able about above across act add address after again against age ago air all almost alone along already
also although always am among amount an and another answer answers any anyone anything appear are area
around art artificial as ask assistant at away baby back bad bank base be became because become been
before began behind being believe below best better between beyond big birth blood body both bottom bread
break breakfast brother brought build building business but buy by call came can cannot car care case cat
cause cent central century certain chance change chat check child children choose church city class clear
close cold colour come common company complete computer consider contain continue control cook cool
correct cost could country course cover create cross cry curious current customer cut daily dark date
daughter day dead deal decide deep degree describe detail detailed develop did die difference different
difficult dinner direct discover do doctor does dog done door doubt down draw dream dress drink drive dry
during each early earth east easy eat edge effect egg eight either else email end energy engine enjoy
enough enter error even evening event ever every example except expect explain express eye face fact fall
family far farm fast father favour feel feet few field fight figure fill final find fine finish fire first
fish five floor flower fly follow food foot for force forest form forward found four free friend from
front full game garden gave general get girl give glass go going gold gone good got govern great green
ground group grow guess guest had half hand happen happy hard has have he head hear heard heart heat heavy
hello help helpful her here high him his history hold home hope horse hot hour house how however human
hundred hurry husband i idea if image important in inch include increase information inside instead
intelligence interest into is island issue it its join joint just keep kind king knew know known land
language large last late later laugh law lay lead learn least leave led left less lesson let letter level
lie life light like line list listen little live local long look lost lot love low machine made mail main
make man manner many mark market matter may me mean measure meet meeting member message metal method
middle might mile milk million mind minute miss modern moment money month more morning most mother
mountain mouth move much music must my name nation nature near need never new news next night nine no
noise none nor north nose not note nothing notice now number object of off offer office often oil old on
once one only open opinion or order other our out outside over own page pain pair paper parent part pass
past pay people perhaps period person phone picture piece place plain plan plane play please point polite
poor position possible post power present press price print problem produce product program protect public
pull purpose push put question questions quick quite race rain raise ran rather reach read ready real
reason receive record region remember remove repeat reply report request rest result return rich ride
right ring rise river road rock role room round row rule run safe said sail salt same sand save saw say
school science sea season seat second see seem seen sell send sense sentence separate serious serve
service set seven several shall shape share she ship shop short should show side sight sign silver similar
simple since sing single sister sit six size skin sleep slow small smile snow so some someone something
son song soon sorry sound south space speak special speed spend spoke spring stand star start state
station stay step still stone stood stop store story street strong student study such sudden sugar summer
sun support sure surface system table take talk tall task teach team tell ten test than thank thanks that
the their them then there these they thing think third this those though thought thousand three through
thus time to today together told tomorrow tonight too took top total touch toward town track trade train
travel tree trip trouble true try turn twelve two type under unit until up upon us use user usual value
various very view village visit voice wait walk wall want war warm was wash watch water way we wear
weather week weight welcome well went were west what wheel when where whether which while white who whole
whose why wide wife will wind window winter wish with within without woman wonder wood word work world
would write wrong year yellow yes yesterday yet you young your""".split()

FILLERS = ["uh", "um", "er", "well", "you know", "I mean", "like", "hmm", "so", "let me see"]
UNITS = {
    "kilometres": "km", "metres": "m", "centimetres": "cm", "kilograms": "kg", "grams": "g", "litres": "l",
    "hours": "h", "minutes": "min", "seconds": "s", "degrees": "deg", "percent": "%", "euros": "EUR", "dollars": "USD",
}  # fmt: skip

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
fifteenth sixteenth seventeenth eighteenth nineteenth twentieth""".split()

ONSETS = """b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm sn sp st str t th
tr tw v w y z""".split()
VOWELS = "a e i o u a e i o u ai ea ee ie oa oo ou y".split()
CODAS = [
    "",
    "",
    "",
    "",
    "n",
    "r",
    "l",
    "s",
    "t",
    "m",
    "k",
    "d",
    "p",
    "x",
    "nd",
    "nt",
    "st",
    "rk",
    "sh",
    "ck",
    "th",
    "ng",
]


def number_word(number: int) -> str:
    """Write a number from 0 to 999 in words: 342 -> three hundred and forty-two."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    rest = number % 100
    return f"{ONES[number // 100]} hundred" + (f" and {number_word(rest)}" if rest else "")


def ordinal_word(day: int) -> str:
    """Write a day of a month in words: 21 -> twenty-first."""
    if day <= 20:
        return ORDINALS[day - 1]
    return "thirtieth" if day == 30 else f"{TENS[day // 10]}-{ORDINALS[day % 10 - 1]}"


def invented_word(rng: random.Random) -> str:
    """Invent a word, such as `skelo` or `traminth`, which a model can only copy."""
    count = rng.choice([1, 2, 2, 2, 3])
    return "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if last == 1 else "")
        for last in range(count, 0, -1)
    )


def code(rng: random.Random) -> str:
    """Invent an identifier of capitals and digits: `K7`, `AB-204`."""
    letters = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return letters + rng.choice(["", "", "-"]) + str(rng.randint(1, 999))


def name(rng: random.Random) -> str:
    """Draw a first name; half of them are invented."""
    return rng.choice(NAMES) if rng.random() < 0.5 else invented_word(rng).capitalize()


def place(rng: random.Random) -> str:
    """Draw a town; half of them are invented."""
    return rng.choice(PLACES) if rng.random() < 0.5 else invented_word(rng).capitalize()


def noun(rng: random.Random) -> str:
    """Draw a noun in the singular: mostly a thing, sometimes an animal, a room or an invented word."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(THINGS)[0]
    if kind < 0.65:
        return rng.choice(ANIMALS)
    return rng.choice(ROOMS) if kind < 0.7 else invented_word(rng)


def any_word(rng: random.Random) -> str:
    """Draw a word of any kind."""
    kinds = [
        noun, name, place, invented_word, code,
        lambda r: r.choice(COLOURS), lambda r: r.choice(SIZES + QUALITIES), lambda r: r.choice(VERBS)[0],
        lambda r: r.choice(JOBS), lambda r: str(r.randint(0, 2000)), lambda r: r.choice(DAYS + MONTHS),
    ]  # fmt: skip
    return rng.choice(kinds)(rng)


def distinct(rng: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    """Draw `count` different words of one kind."""
    words: list[str] = []
    while len(words) < count:
        word = make(rng)
        if word not in words:
            words.append(word)
    return words
