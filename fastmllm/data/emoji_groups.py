"""Which emoji are concrete, picturable things, and what kind of thing each of them is."""

from __future__ import annotations

# The rule: one thing that can be named from its drawing alone, in one or two words. Left out, because they are
# not things or cannot be told apart: faces, hands, people and their roles, flags, symbols and arrows, clocks,
# moon phases, keycaps, suits of cards, scenes (sunset, camping); of near-identical series one member is kept
# (train of the nine rail vehicles, automobile of automobile and taxi, fish of fish and tropical fish, rooster of
# chicken and rooster, dog of dog and guide dog, closed book of five colours of book).
# Only emoji of a single code point, without the variation selector.
# No group has the name of an emoji: a caption that names both ("an ant, bug") would count as one thing too many.
PICTURABLE: dict[str, str] = {
    "animal": "🐒🦍🐕🐩🐺🦊🦝🐈🦁🐅🐆🐎🦄🦓🦌🐄🐖🐏🐐🐪🦒🐘🦏🦛🐁🐇🐿🦔🦇🐻🐨🐼🦥🦘🐸🐊🐢🦎🐍🐉🦕🐌🕷🦂🪱",
    "bird": "🦃🐓🐤🐧🦅🦆🦢🦉🦩🦚🦜🕊",
    "sea animal": "🐋🐬🦭🐟🐡🦈🐙🦀🦞🦐🦑🦪🪼",
    "insect": "🦋🐛🐜🐝🐞🦗🦟🪰",
    "flower": "💐🌸🌹🌺🌻🌷🪷🪻",
    "plant": "🌲🌳🌴🌵🍁🍄☘🌱🪴",
    "fruit": "🍇🍉🍊🍋🍌🍍🥭🍎🍐🍑🍒🍓🫐🥝🥥",
    "vegetable": "🥑🍆🥔🥕🌶🫑🥒🥬🥦🧄🧅🍅",
    "food": "🍞🥐🥨🥯🥞🧇🧀🥓🍔🍟🍕🌭🥪🌮🥚🥗🍿🧈🍙🍣🥟🍝🥫",
    "dessert": "🍨🍩🍪🎂🍰🧁🥧🍫🍬🍭🍮🍯",
    "drink": "☕🫖🍷🍸🍹🍺🧋🧃🍼",
    "building": "🏠🏥🏭🏰⛪🕌🛕⛩⛲⛺🏟🎪🎡🎢🛖",
    "vehicle": "🚂🚆🚌🚑🚒🚓🚗🚚🚜🏎🏍🛵🚲🛴🛹⛵🛶🚢✈🚁🚀🛸🪂",
    "nature": "☀🌙⭐☁🌪🌈❄☃⚡🔥💧🌊☄🪐🌋⛰",
    "sport": "⚽⚾🏀🏐🏈🎾🎳🏓🏸🥊🥅⛸🎿🥌",
    "toy": "🪀🪁🎲🧩🧸🎈🪆🎮🎯🪃",
    "clothing": "👓🕶👔👕👖🧣🧤🧥🧦👗👘🩳👙👛👜🎒👟🥾👑🎩🧢",
    "instrument": "🎷🎺🪗🎸🎹🎻🪕🥁🪇🪈🔔",
    "device": "📱☎💻🖨⌨📺📷📻🔋🔌💡🔦🎧🎤⌚",
    "tool": "🔨🪓🔧🪛🪚🧲🪜🔑⚙🧯🪣",
    "furniture": "🚪🛏🪑🚽🚿🛁🪞🛒",
    "stationery": "✏🖍📎📏📐📌📅📰✉📕✂",
}

GROUP_NAMES_ZH: dict[str, str] = {
    "animal": "动物",
    "bird": "鸟",
    "sea animal": "海洋动物",
    "insect": "昆虫",
    "flower": "花",
    "plant": "植物",
    "fruit": "水果",
    "vegetable": "蔬菜",
    "food": "食物",
    "dessert": "甜点",
    "drink": "饮料",
    "building": "建筑",
    "vehicle": "交通工具",
    "nature": "自然",
    "sport": "运动",
    "toy": "玩具",
    "clothing": "衣物",
    "instrument": "乐器",
    "device": "电器",
    "tool": "工具",
    "furniture": "家具",
    "stationery": "文具",
}


def group_by_codepoint() -> dict[str, str]:
    """Return the group of each picturable emoji.

    Returns:
        Hexadecimal code point in lower case, e.g. "1f34e" -> "fruit".
    """
    return {f"{ord(char):x}": group for group, chars in PICTURABLE.items() for char in chars}
