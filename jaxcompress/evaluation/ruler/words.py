"""English words, of which keys are made and lists consist. RULER takes those of the package wonderwords."""

from __future__ import annotations

import random

_ADJECTIVES = (
    "able acid aged alert amber ample angry arctic ashen bare bitter blank bold brave brief bright brisk broad broken "
    "calm careful cheap cheerful chief civil clean clear clever cold common cool coral crisp crooked curious curly "
    "daily damp daring dark deep dense distant double dry dull dusty eager early easy elder empty equal even exact "
    "faint fair famous fancy fast fierce final firm flat fond fragile free fresh frosty full gentle giant glad golden "
    "grand grave great green grim hard harsh heavy hidden hollow honest humble icy idle ideal inner ivory jolly keen "
    "kind large late lazy lean level light little lively local lonely long loose loud loyal lucky major mellow merry "
    "mild minor misty modern modest narrow neat nimble noble odd open oval pale patient plain polite proud purple "
    "quick quiet rapid rare raw ready regal rich rigid ripe rough round royal rural rusty sandy scarce secret serene "
    "sharp shiny short shy silent silver simple sleek slim slow smart smooth snowy soft solid sour spare steady steep "
    "stern strange strict strong sturdy subtle sudden sunny sweet swift tall tame tart tender thick thin tidy tight "
    "tiny tough true upper urban usual vague vain vast violet vivid warm weary weird wide wild wise witty wooden "
    "young zealous"
)
ADJECTIVES = tuple(_ADJECTIVES.split())

_NOUNS = (
    "acorn actor almond anchor ankle apple apron arrow attic badge bakery balcony bamboo banner barber barn barrel "
    "basin basket beach beacon beard beaver bedroom beetle bench berry bicycle blanket blossom board boat bonnet boot "
    "border bottle boulder bracelet branch bread brick bridge broom brother bucket buffalo bundle bureau butter "
    "button cabin cable camel camera canal candle canoe canvas captain caravan cargo carpet carrot castle cattle cave "
    "cedar cellar chain chair chalk chapel charcoal cheese cherry chest chimney circle citizen clay cliff clock cloth "
    "cloud clover coach coast cobra coffee collar comet compass copper cotton cottage cousin crane crater cricket "
    "crown crystal cup curtain daisy dancer desert diamond dinner doctor dolphin donkey door dragon drawer dress drum "
    "eagle earth easel echo elbow elephant engine envelope fabric falcon farmer father feather fence ferry fiddle "
    "field finger flag flame flute forest fork fountain fox frame friend frog furnace galaxy garden garlic gate "
    "ginger glacier glass glove goat goose grain grape gravel guitar hammer hamster harbor harvest hat hazel hedge "
    "helmet herald heron hill honey horse hotel house hunter island jacket jar jasmine jelly jewel journal judge "
    "juice jungle kettle kitchen kite kitten knee knight ladder ladle lagoon lamp lantern laurel lawyer leaf leather "
    "lemon letter lily linen lion lizard lobster lock magnet mango mantle maple marble market mask meadow melon "
    "merchant mill mirror monkey moon mother mountain mouse museum mushroom napkin needle neighbor nest nickel night "
    "noodle notebook nurse oak oasis ocean olive onion orange orchard organ otter oven owl oyster paddle painter "
    "palace panther paper parade parcel parrot pasture path peach peacock pear pebble pencil pepper piano pigeon "
    "pillow pilot pine pirate planet plaza plum pocket poet pony porch potato prairie prince pumpkin puppet puzzle "
    "quarry queen quill rabbit radio raft rain rainbow ranch raven razor reef ribbon rice ridge ring river road robin "
    "rocket roof rooster rope rose rug saddle sailor salad salmon sandal scarf school scissors sculptor seal seed "
    "shadow shark sheep shelf shell shepherd ship shirt shoe shore shovel shrimp signal singer sister skirt sled "
    "slipper snail soap sock soldier sparrow spider spoon spring squirrel stable stair star statue stone storm stove "
    "street sugar summit swan table tailor teacher temple tent theater thimble thorn thunder tiger timber toast "
    "tomato torch tower trail train trumpet tulip tunnel turkey turtle uncle valley vase velvet village vine vinegar "
    "violin wagon waiter walnut walrus watch water weaver whale wheat wheel whistle widow willow window winter wizard "
    "wolf wool writer yacht yarn zebra"
)
NOUNS = tuple(_NOUNS.split())


def random_word(rng: random.Random) -> str:
    """An adjective and a noun: `brave-otter`. There are some 90,000."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct_words(count: int, rng: random.Random) -> list[str]:
    """So many different words in a drawn order; beyond the single ones, words like those of `random_word`."""
    single = sorted({*ADJECTIVES, *NOUNS})
    words = dict.fromkeys(rng.sample(single, min(count, len(single))))
    while len(words) < count:
        words.setdefault(random_word(rng))
    return list(words)
