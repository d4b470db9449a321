"""In which order tasks are held out, and which of them the sub-studies have."""

from __future__ import annotations

FEW = ("movies", "reviews", "newsgroups", "noun-kinds")  # for all but the main table; two of each kind
# the task that the main table showed to be hardest for the fleet's basis: to find out what closes that
DIGGING = (*FEW, "speech-parts")
IMAGE_TASKS = ("tops", "footwear", "garments", "digits-low", "digits-high")
ORDER = (
    "movies",
    "noun-kinds",
    "reviews",
    "newsgroups",
    "tweets",
    "reuters",
    "products",
    "speech-parts",
    "editorials",
    "election",
    "moods",
    "mail",
)
