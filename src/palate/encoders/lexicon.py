r"""Word lists of the style encoder: (meaning, one alternation of lower-case English phrases) for each class of words.

Written for answers of assistants in general. A phrase belongs to one class; where two could match at the same place, the earlier
class wins. `\w*` takes every ending. Changing a list changes the features: raise `VERSION` in `offline.py`.
"""

PHRASES: dict[str, tuple[str, str]] = {
    "politeness": (
        "please, thanks, sorry",
        r"please|thank you|thanks|sorry|excuse me|pardon|apologi\w*|kindly|you're welcome",
    ),
    "formal words": (
        "furthermore, therefore, with regard to",
        r"furthermore|moreover|therefore|thus|hence|consequently|accordingly|in addition|nevertheless|nonetheless|whereas|"
        r"regarding|with regard to|in respect of|pertinent|advisable|recommended|prudent|appropriate|necessary|require\w*|"
        r"request\w*|one should|shall|hereby|aforementioned|pursuant|subsequent\w*|prior to|in order to|utili[sz]e\w*|ensure|"
        r"obtain\w*|facilitate\w*|considerations?|upon",
    ),
    "casual words": (
        "okay, yeah, gonna, stuff",
        r"okay|ok|yeah|yep|nope|hey|hi|alright|gonna|wanna|gotta|kinda|sorta|stuff|guys|cool|awesome|cheers|anyway|basically|"
        r"pretty much|kind of|sort of|no worries|tons of|super|dude|folks|go ahead|whatever",
    ),
    "contractions": (
        "don't, it's, you'll",
        r"\w+n't|\w+'(?:re|ll|ve|m|d)|(?:it|that|there|here|what|who|he|she|let|how|where)'s",
    ),
    "hedging": (
        "maybe, might, probably, in most cases",
        r"may|maybe|might|could|perhaps|possibl[ey]|probably|likely|seems?|appears?|arguably|presumably|apparently|roughly|"
        r"somewhat|tends? to|i think|i believe|i guess|i suppose|not sure|not entirely sure|it depends|depends?|"
        r"in most cases|often|usually|sometimes|generally|as far as i|i could be wrong|uncertain|unclear",
    ),
    "certainty": (
        "always, must, definitely",
        r"always|never|must|definitely|certainly|clearly|obviously|undoubtedly|without doubt|absolutely|of course|no doubt|"
        r"guaranteed?|surely|exactly|proven",
    ),
    "getting to the point": (
        "short answer, bottom line, in short",
        r"short answer|bottom line|in short|in one line|in a nutshell|tl;?dr|simply put|just do|do this|start now|now|stop|"
        r"skip|the answer is|first step",
    ),
    "long way round": (
        "before we begin, all things considered",
        r"before we|let me begin|background|all things considered|in the end|to begin with|there are (?:many|several) ways|"
        r"on the one hand|on the other hand|in conclusion|to sum up|overall|ultimately|conclusion",
    ),
    "warmth": (
        "I hear you, take care, glad, hug",
        r"i hear you|i understand|makes (?:complete |perfect )?sense|glad|happy to|take (?:good )?care|not alone|"
        r"rooting for you|here for you|hugs?|gentle|kind|kindness|love|loving|friend|dear|warm\w*|heart\w*|comfort\w*|"
        r"support\w*|proud|feel|feelings?|i care|care about|be kind|yourself|hope|wishing|understandable|tough|look after",
    ),
    "enthusiasm": (
        "great, amazing, exciting, can't wait",
        r"great|amaz\w*|excit\w*|fantastic|wonderful|brilliant\w*|incredibl[ey]|thrill\w*|fun|enjoy\w*|perfect\w*|excellent|"
        r"delight\w*|can't wait|cannot wait|go for it|wow|you've (?:absolutely )?got this|you have (?:absolutely )?got this|"
        r"yay|superb|magnificent",
    ),
    "humour": (
        "haha, just kidding, joke",
        r"(?:ha)+h?|lol|lmao|(?:he){2,}|joke\w*|joking|kidding|funny|pun|humou?r\w*|no pun intended|silly|ridiculous\w*|"
        r"laugh\w*|hilarious\w*|irony|ironic\w*|plot twist|spoiler",
    ),
    "examples": (
        "for example, for instance, such as",
        r"for examples?|for instance|such as|e\.g\.?|as an example|to illustrate|imagine|like when|say that",
    ),
    "reasons": (
        "because, since, which is why",
        r"because|since|so that|that's why|that is why|which is why|the reason|due to|as a result|leads? to",
    ),
    "negation": (
        "not, no, nothing",
        r"not|no|nothing|nobody|none|nor|neither|without|cannot",
    ),
    "says I": (
        "I, me, my",
        r"i|me|my|mine|myself",
    ),
    "says you": (
        "you, your",
        r"you|your|yours",
    ),
    "says we": (
        "we, us, our",
        r"we|us|our|ours|ourselves|let's",
    ),
}
