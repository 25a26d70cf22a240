"""The word lists of the small world: names, goods, towns, days, and plain English words to copy and quote."""

from __future__ import annotations

FIRST_NAMES = """
Ada Agnes Alba Alec Alma Amos Anders Anika Anton April Arlo Asta Aster Axel Basil Bea Bella Benno Berta Birgit Bodil Boris Bruno Cara Carla Cedric
Celia Clara Clem Conrad Cora Cyril Dagny Daisy Dario Della Denis Dora Doris Duncan Edgar Edith Edwin Elena Elias Elin Ella Elmer Elsa Emil Emma Enid
Enzo Erik Erna Esther Eva Ezra Fabian Faye Felix Fern Fiona Flora Frank Freya Frida Fritz Gary Gemma George Gerda Gilda Gina Grace Greta Gus Gwen Hanna
Hans Harald Hazel Heidi Helga Henry Herman Hilda Hugo Ian Ida Igor Ilsa Inga Ingrid Iris Isak Jack Jana Jasper Jens Joan Johan Jonas Jorge Judith Julia
June Karin Katja Kira Klara Knut Kurt Lars Laura Lea Leif Lena Leo Leona Lewis Lida Linus Lisa Livia Lotte Lou Lucas Lucy Luna Lydia Mabel Magda Magnus
Maja Malin Marek Margot Maria Marta Martin Matilda Max May Merle Mia Mila Milo Mina Miriam Moira Mona Moritz Nadia Nell Nico Nina Noah Nora Olaf Olga
Oliver Oona Orla Oscar Otis Otto Paula Pavel Pearl Penny Peter Petra Pia Piet Quinn Ralf Ramona Rasmus Rene Rex Rita Robin Rolf Roman Rosa Rosie Rowan
Ruby Rufus Ruth Sam Sander Sara Selma Sigrid Silas Simon Sofia Stella Stig Sven Sylvia Tara Ted Thea Theo Thora Tilda Till Tim Tobias Tom Tora Ulla Uma
Una Ursula Valda Vera Victor Viggo Viktor Viola Wanda Wendy Wilma Yara Yuri Zelda Zoe Zora
""".split()

GOODS = """
candles lamps plates cups bowls spoons forks pots pans kettles baskets barrels buckets bottles jars boxes bags sacks ropes nets hooks sails oars
anchors boots shoes socks gloves hats coats shirts belts scarves blankets pillows curtains carpets chairs tables stools benches shelves mirrors clocks
books maps pens pencils letters stamps envelopes notebooks brushes brooms mops towels soaps combs needles buttons ribbons threads hammers saws axes
shovels rakes ladders bricks tiles boards planks nails screws wires bolts hinges locks keys chains bells drums flutes whistles dolls kites puzzles
balls apples pears plums cherries lemons onions carrots potatoes cabbages beans eggs cheeses loaves rolls cakes pies biscuits sausages herrings crabs
mussels pumpkins turnips tulips roses seeds bulbs trees wheels carts saddles tents torches lanterns batteries cables filters pumps valves fans radios
cameras tickets posters flags umbrellas
""".split()

TOWNS = """
Olm Arden Ashby Bexley Birk Bolton Brill Calder Corby Crane Dale Denby Dover Elmo Elston Fairley Farrow Galway Glen Harlow Haven Hollin Hythe Kelby
Kirk Lanby Linden Lowick Marsh Melby Milton Morden Nesbo Norwick Oakley Orby Padstow Penby Quarry Ransby Redhill Rigby Ripley Selby Skipton Stanby
Stoke Tarn Thornby Upton Vale Walden Welby Wexford Whitby Winslow Yarrow Zeeby
""".split()

PET_NAMES = """
Bongo Patch Rusty Misty Ginger Pebble Fluffy Shadow Lucky Bandit Cookie Domino Frosty Hazelnut Jumper Lemon Mango Noodle Olive Poppy Rascal Smokey
Socks Spot Tiger Whiskers Ziggy Truffle Muffin Peanut
""".split()

COLOURS = "red blue green yellow white black brown grey purple pink orange silver gold".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

WORDS = """
able about above accept account across act add address after again age agree air alarm all allow almost alone along already also always amount angle
animal answer any anyone anything appear area arm around arrive ask at away baby back bad bake ball bank bar base basic bath battery be beach bear beat
beautiful because become bed before begin behind believe belong below beside best better between big bill bird bit bite blow board boat body boil bone book
born both bottom box brass break breakfast bridge bright bring brother build building bulb bus busy button buy cable call calm camp can car card care carry
case catch cause centre chair chance change charge charger cheap check child choice choose church circle city class clean clear climb clock close cloth
cloud coal coast coat code coffee cold collect colour come common company complete contain cook cool copy cord corner cost cotton could count country couple
course cover crack cream create cross cry cup current cut daily dance danger dark date daughter day dead deal dear decide deep delay deliver delivery desk
detail device difference different dim dinner dirty discount dish distance dog door double doubt down draw dream dress drink drive drop dry during dust duty
each ear early earth ease east easy eat edge effect egg eight either electric else email empty end energy engine enjoy enough enter equal error even evening
ever every everyone exact example except exchange expect explain express extra eye face fact fall family far farm fast father favour fear feather feed feel
few field fight fill final find fine finger finish fire first fish fit five fix flash flat floor flow flower fly fold follow food foot for force foreign
forget form four free fresh friend from front fruit full fun future game garden gas gentle get gift girl give glad glass go gold good grain grass great
green ground group grow guarantee guess guest guide half hall hand handle hang happen happy harbour hard have head hear heart heat heavy height help here hide
high hill hold hole holiday home honest hope horse hot hour house how hundred hurry hurt ice idea if important in inch indoor inside instead invoice iron
island item job join journey joy jump just keep key kind kitchen knife knob know lamp land language large last late laugh law lay lead leaf learn leave left
leg less lesson let letter level lid life lift light like limit line list listen little live load local lock long look lose loud love low lower luck lunch
machine mail main make man manual many map mark market match material matter maybe meal mean measure meat meet melt memory metal middle might mile milk mind
minute miss mode model moment money month moon more morning most mother mountain mouth move much music must nail name narrow nation near neck need needle
never new news next nice night nine no noise none north nose not note nothing notice now number ocean of off offer office often oil old on once one online
only open opinion option order other our out outdoor outside oven over own pack package page pain paint pair paper parcel parent part party pass past path
pattern pay payment pen people perhaps person phone photo pick picture piece pin pipe place plain plan plant plastic plate play please plug pocket point
police pool poor port position possible post pot pound power press pretty price print problem product promise proper protect proud prove pull pump pure
purpose push put quality quarter queen question quick quiet quite radio rain raise range rate reach read ready real reason receipt receive recycle red refund
remember remote remove rent repair repeat replace reply report request reset rest return rice rich ride right ring rise river road rock roll roof room root
rough round route row rule run rust sad safe sail salt same sample sand save say scale school science screen screw sea season seat second secret see seem sell
send sense serial serve service set setting seven shade shadow shake shape share sharp sheet shelf shine ship shipping shoe shop short should shoulder show
shower side sign signal silver simple since sing sister sit six size skin sky sleep slide slip slow small smart smell smile smoke smooth snow so soap soft
soil some son song soon sort sound soup south space spare speak special speed spell spend spoon sport spot spread spring square stage stair stand standard
star start state station stay steady steam steel step stick still stock stone stop store storm story straight strange street strong student study such sudden
sugar suit summer sun support sure surface surprise sweet swim switch system table tail take talk tall tank tap taste teach team tell ten tent test thank that
then there thick thin thing think third this thousand thread three through throw ticket tie tight time timer tin tip tired to today together tomorrow tonight
too tool tooth top touch toward tower town track trade train travel tree trick trip trouble true trust truth try turn twelve twice two type under until up
upper upset use useful usual valley value view village visit voice voltage wait wake walk wall want warm warranty wash waste watch water waterproof wave way
weak wear weather week weigh weight welcome well west wet what wheel when where which while whole why wide wild will win wind window wine winter wipe wire
wise wish with without wonder wood wool word work world worry worth wrap write wrong yard year yellow yes yesterday yet young zero
""".split()
