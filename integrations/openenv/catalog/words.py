"""Common English words for made-up messages: short ones, of one or two tokens in most vocabularies."""

_TEXT = """
apple arm autumn baby back bag ball band bank bar basket bath beach bean bear bed bee bell bench bike bird black
blanket blue board boat body bone book boot bottle bottom bowl box boy branch bread breakfast brick bridge bright
broad brother brown brush bucket building bus bush butter button cabin cake camera camp candle cap car card carpet
castle cat chair chalk cheese cherry chicken child chin circle city clay clean clear clock cloth cloud coal coat
coffee coin cold color comb cook copper corn corner cotton cow cream cross crown cup curtain dance dark day deep
deer desk dinner dish doctor dog doll door dove dream dress drum dry duck dust eagle early ear earth east egg
elbow empty engine evening eye face fair fall family farm fast father feather fence field film finger fire fish
flag flame flat floor flower fly fog food foot forest fork fox frame fresh friend frog front fruit full garden gate
giant girl glad glass glove goat gold good grain grape grass gray great green ground guitar hair hall hammer hand
happy harbor hat hawk head heart heavy hen high hill holiday honey hook horse hot hotel house ice ink iron island
jacket jar juice jungle kettle key kind king kitchen kite knee knife lake lamb lamp land large leaf leather left
leg lemon letter light line lion lip little long loud low lunch machine map market meadow meat metal middle milk
mirror money monkey moon morning mother mountain mouse mouth music nail narrow neck needle nest new night noise
north nose nut ocean office oil old onion open orange oven owl page paint paper park party path peach pen pencil
pepper piano picture pig pillow pin pink pipe plain plane plant plate pocket pond poor pot potato quick quiet
rabbit radio rain red rice rich right ring river road rock roof room root rope rose round sail salt sand school
sea seat seed sharp sheep shelf shell ship shirt shoe shop short shoulder silver sister sky slow small smoke smooth
snake snow soap soft song soup south spoon spring square star station steam stone store storm strong sugar summer
sun sweet table tail tall tea tent thick thin thread ticket tiger tooth tower town toy train tree truck valley
village violin voice wagon wall warm watch water wave west wet wheel white wide wild wind window wine wing winter
wolf wood wool yard year yellow young
"""

WORDS = tuple(_TEXT.split())
