"""The vocabulary of question_rules.py: forms of questions, places, and words that make poor answers or topics."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.replace("_", " ") for text in text.split())


MONTHS = _words("January February March April May June July August September October November December")

COUNTRIES = _words(
    """
    Afghanistan Albania Algeria Argentina Argentine_Republic Australia Austria Austria-Hungary Bavaria Belgium
    Bolivia Brazil Bulgaria Cambodia Canada Chile Chili China Colombia Costa_Rica Cuba Czechoslovakia Denmark
    Dominican_Republic Ecuador Egypt El_Salvador England Ethiopia Finland France Germany Great_Britain Greece
    Guatemala Haiti Hayti Hawaii Honduras Hungary Iceland India Indonesia Iran Iraq Ireland Israel Italy Japan
    Jordan Kuwait Korea Laos Lebanon Liberia Mexico Morocco Netherlands New_Zealand Nicaragua Norway Pakistan Panama
    Paraguay Persia Peru Poland Portugal Prussia Roumania Russia Salvador Santo_Domingo Saudi_Arabia Servia Siam
    South_Africa Spain Sweden Switzerland Syria Thailand Tunis Turkey Uruguay Venezuela Vietnam Yugoslavia
    """
)
STATES = _words(
    """
    Alabama Alaska Arizona Arkansas California Colorado Connecticut Delaware Florida Georgia Idaho Illinois Indiana
    Iowa Kansas Kentucky Louisiana Maine Maryland Massachusetts Michigan Minnesota Missouri Montana Nebraska Nevada
    New_Hampshire New_Jersey New_Mexico North_Carolina North_Dakota Oklahoma Oregon Pennsylvania Rhode_Island
    South_Carolina South_Dakota Tennessee Texas Utah Vermont Virginia West_Virginia Wisconsin Wyoming
    """
)
CITIES = _words(
    """
    Baltimore Berlin Bogota Boston Brussels Buenos_Aires Buenos_Ayres Canton Charleston Chicago Cincinnati
    Constantinople Detroit Galveston Geneva Havana Jerusalem Lima Lisbon Liverpool London Madrid Manila Matamoras
    Mobile Monterey Moscow Naples New_Orleans Paris Pekin Peking Pensacola Philadelphia Pittsburgh Rio_de_Janeiro
    Rome Saigon San_Francisco Santa_Fe Santiago Savannah Shanghai Tampico Tokyo Valparaiso Vera_Cruz Vienna
    """
)

GAP = "___"
GAP_FORMS = (
    'Which {kind} belongs in the gap: "{phrase}"?',
    'Which {kind} is missing from "{phrase}"?',
    'What does the gap stand for in "{phrase}"?',
)
_ANY_FORMS = (
    "Which {kind} is mentioned in connection with the {topic}?",
    "Which {kind} does the speaker mention when speaking of the {topic}?",
    "The sentence about the {topic} mentions which {kind}?",
)
TOPIC_FORMS = dict.fromkeys(("date", "year", "person", "officer", "country", "state", "city", "name"), _ANY_FORMS) | {
    "amount": (
        "What sum of money is stated in connection with the {topic}?",
        "What amount does the speaker name when speaking of the {topic}?",
        "How much money is spoken of in the sentence about the {topic}?",
    ),
    "percentage": (
        "What percentage is stated in connection with the {topic}?",
        "What percentage does the speaker name when speaking of the {topic}?",
        "How many per cent are spoken of in the sentence about the {topic}?",
    ),
    "number": (
        "How many {counted} are mentioned in connection with the {topic}?",
        "How many {counted} does the speaker count when speaking of the {topic}?",
        "The sentence about the {topic} mentions how many {counted}?",
    ),
}

# A name never holds them; where they are capitalised, another sentence or a heading begins.
FUNCTION_WORDS = _words(
    """
    His Her Its Their The This That These Those Our We It In On An And But If He They There When Whether Shall You
    Your My To For Not No Yes What Why How Let As At By From With Is Are Was Were Be Such All Some Any Each Every
    """
)
# A name of these words alone is in every address.
COMMON_NAMES = _words(
    """
    Congress Congresses Government Governments State States Federal Nation National Union President Senate House
    Executive Constitution Constitutional Administration Republic Republics Department Departments Territory
    Territories Treasury Secretary Commission Commissioner Commissioners Legislature American Americans America Mr
    Messrs Hon Dr Gen St God Providence Almighty Representative Representatives Senator Senators Houses Act Bill
    Message Committee Court Army Navy General Post Divine Supreme Creator Heaven Chief Minister Cabinet Office
    Presidential Congressional Nations Members Member Speaker Vice Mrs Miss Sir Captain Colonel Commander United
    North South East West Board Staff Assembly Order Orders Land Accounting January February March April May June
    July August September October November December
    """
)

# What looks like a counted noun and is none.
NOT_COUNTED = _words(
    """
    this thus less does was has perhaps its per cents hundreds thousands millions billions times minus plus across
    always yes besides whereas unless towards upwards afterwards against
    """
)
# What a name cannot end with.
ADJECTIVES = _words("Federal National General American Constitutional Presidential Congressional Divine Supreme Chief")
# Too vague to point at a sentence, or no noun.
NO_TOPIC = _words(
    """
    of in to for from with by and which that at on was were is are has have had will shall may between or as it
    year years time times sum amount number same whole fact part parts present past other others latter former first
    second third last most least best like above following day days month months end one ones result way case
    country people total value cost rate date half extent more less subject purpose matter thing things said order
    use view hand world manner means need point place power very only next such several various certain great
    greater greatest large larger small new old own good better high higher low lower proper necessary important
    further additional entire general particular late early recent then now not be so all any some each every both
    two three four five six seven eight nine ten being course session opinion name attention beginning aspect
    history kind spirit question present actual mere
    """
)
