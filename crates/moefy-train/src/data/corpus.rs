//! Text that this project writes itself: little day reports whose tokens are easy or hard by construction.
//!
//! Easy: the fixed lines of a place, which a model learns by heart. Harder: who lives where, does what and keeps
//! which animal, the same in all texts of all seeds, so that only memory helps. Hard: prices looked up in the list at the top,
//! sums of them, marks, names and words copied from further up, numbers put in order. Impossible: numbers that
//! nothing foretells. A model that tells these apart has something to route by.

use anyhow::{Error, Result};
use rand::Rng;
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer, TokenizerBuilder};

/// The token between documents, id 0 of [`train_tokenizer`]; also the marker of text files.
pub const BOUNDARY: &str = super::format::DOCUMENT_MARKER;

/// A place whose days are reported.
struct Place {
    name: &'static str,
    opening: &'static str,
    /// How the list of numbers is introduced.
    list: &'static str,
    unit: &'static str,
    goods: [&'static str; 6],
    habits: [&'static str; 3],
    closing: &'static str,
}

const PLACES: [Place; 5] = [
    Place {
        name: "the fruit stall by the harbour",
        opening: "opened the shutters, swept the floor and put the kettle on, as on every other day.",
        list: "The price list on the wall said:",
        unit: "coins",
        goods: ["apples", "pears", "plums", "cherries", "figs", "lemons"],
        habits: [
            "The gulls circled over the boats and cried for bread.",
            "The cat slept on the empty crates until the sun came round.",
            "The church bell rang, and the fishermen came up the steps for their tea.",
        ],
        closing: "folded the awning, counted the coins and walked home along the quay.",
    },
    Place {
        name: "the seed shop on the hill",
        opening: "watered the pots by the window, lit the stove and turned the sign on the door.",
        list: "The chalk board behind the counter said:",
        unit: "pennies",
        goods: ["beans", "peas", "poppies", "carrots", "tulips", "onions"],
        habits: [
            "The stove crackled, and the whole shop smelled of earth and rain.",
            "The old clock ticked between the drawers as if nothing could ever happen.",
            "The postman leaned his bicycle against the wall and rested in the shade.",
        ],
        closing: "put out the stove, watered the pots once more and turned the sign around.",
    },
    Place {
        name: "the small library at the station",
        opening: "dusted the shelves, wound up the clock and laid the newspapers on the long table.",
        list: "The shelf plan at the door said:",
        unit: "steps",
        goods: ["maps", "poems", "letters", "novels", "songs", "plays"],
        habits: [
            "The express train went by, and for a moment all the windows trembled.",
            "The readers turned their pages softly, and nobody said a word.",
            "The station master came in, took off his cap and asked for the time.",
        ],
        closing: "put the newspapers back, turned down the lamps and locked the heavy door.",
    },
    Place {
        name: "the bakery under the clock tower",
        opening: "lit the oven, kneaded the dough and opened the window to the square.",
        list: "The slate above the counter said:",
        unit: "pence",
        goods: ["rolls", "loaves", "cakes", "pies", "buns", "tarts"],
        habits: [
            "The smell of warm bread went out into the square and woke the neighbours.",
            "The children pressed their noses against the glass and waited for crumbs.",
            "The pigeons on the clock tower shook their feathers and waited, too.",
        ],
        closing: "swept up the flour, covered the dough for the night and closed the window.",
    },
    Place {
        name: "the workshop behind the mill",
        opening: "sharpened the tools, oiled the lathe and hung the lantern over the bench.",
        list: "The note beside the bench said:",
        unit: "shillings",
        goods: ["chairs", "wheels", "ladders", "boxes", "spoons", "toys"],
        habits: [
            "The mill wheel turned and turned, and the water ran on to the sea.",
            "The sawdust danced in the light that fell through the little window.",
            "The miller looked in, shook his head and talked about the weather.",
        ],
        closing: "wiped the tools, blew out the lantern and followed the stream back to the village.",
    },
];

const NAMES: [&str; 24] = [
    "Mara", "Tom", "Ilse", "Pavel", "Nina", "Oskar", "Rosa", "Henk", "Leyla", "Bruno", "Greta", "Jonas",
    "Amira", "Felix", "Yuki", "Marta", "Samir", "Vera", "Anton", "Dora", "Emil", "Clara", "Hugo", "Petra",
];

const COLOURS: [&str; 8] = ["red", "blue", "green", "white", "black", "yellow", "brown", "grey"];

const THINGS: [&str; 12] =
    ["lamp", "rope", "cup", "coat", "key", "boat", "book", "hat", "bell", "drum", "stone", "kite"];

const SURNAMES: [&str; 16] = [
    "Lindqvist",
    "Okafor",
    "Bauer",
    "Moreau",
    "Sato",
    "Novak",
    "Rossi",
    "Haddad",
    "Jensen",
    "Marin",
    "Keller",
    "Dubois",
    "Tanaka",
    "Petrov",
    "Costa",
    "Weber",
];

const STREETS: [&str; 16] = [
    "Mill Lane",
    "Bridge Street",
    "the Salt Steps",
    "Orchard Row",
    "the old wall",
    "Tower Yard",
    "Ferry Road",
    "the north gate",
    "Linden Square",
    "Copper Alley",
    "the chapel",
    "Harbour Street",
    "Goose Green",
    "the upper ford",
    "Candle Court",
    "Willow Bank",
];

const TRADES: [&str; 16] = [
    "weaver", "cooper", "smith", "teacher", "ferryman", "tailor", "painter", "doctor", "miller", "carter",
    "printer", "mason", "gardener", "potter", "joiner", "clerk",
];

const ANIMALS: [&str; 16] = [
    "goats",
    "pigeons",
    "rabbits",
    "a donkey",
    "three hens",
    "a fox",
    "bees",
    "two ponies",
    "ducks",
    "a heron",
    "sheep",
    "an owl",
    "frogs",
    "a tortoise",
    "geese",
    "a badger",
];

const INSTRUMENTS: [&str; 12] = [
    "flute", "fiddle", "harp", "horn", "lute", "zither", "viola", "cello", "organ", "pipes", "bassoon",
    "guitar",
];

const COUNTS: [&str; 7] = ["one", "two", "three", "four", "five", "six", "seven"];

/// `count` day reports of one to two hundred words. The first documents do not depend on `count`.
pub fn documents(seed: u64, count: usize) -> Vec<String> {
    (0..count as u64)
        .map(|document| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(document);
            Day::new(rng).report()
        })
        .collect()
}

/// One day in the making.
struct Day {
    rng: ChaCha8Rng,
    place: &'static Place,
    keeper: &'static str,
    /// Names of people who have not come by yet.
    visitors: Vec<&'static str>,
    /// The list at the top.
    prices: Vec<(&'static str, u32)>,
    /// What the evening comes back to.
    evening: Vec<String>,
}

impl Day {
    fn new(mut rng: ChaCha8Rng) -> Self {
        let place = &PLACES[rng.random_range(0..PLACES.len())];
        let mut visitors = NAMES.to_vec();
        visitors.shuffle(&mut rng);
        let keeper = visitors.pop().unwrap_or("Mara");
        let mut goods = place.goods;
        goods.shuffle(&mut rng);
        let listed = rng.random_range(3..=5);
        let prices = goods[..listed].iter().map(|&good| (good, rng.random_range(2..=19))).collect();
        Self { rng, place, keeper, visitors, prices, evening: Vec::new() }
    }

    fn report(mut self) -> String {
        let (keeper, place) = (self.keeper, self.place);
        let day = self.rng.random_range(100..1000);
        let prices: Vec<String> = self.prices.iter().map(|(good, price)| format!("{good} {price}")).collect();
        let mut episodes: [fn(&mut Self) -> String; 8] = [
            Self::lookup,
            Self::sum,
            Self::comparison,
            Self::parcel,
            Self::parrot,
            Self::sorting,
            Self::raffle,
            Self::clock,
        ];
        episodes.shuffle(&mut self.rng);
        let chosen = self.rng.random_range(2..=4);
        let mut middle = Vec::new();
        for episode in &episodes[..chosen] {
            middle.push(episode(&mut self));
            middle.push(self.person());
            if self.rng.random_bool(0.3) {
                middle.push(place.habits[self.rng.random_range(0..place.habits.len())].to_owned());
            }
        }
        for _ in 0..2 {
            middle.push(self.person());
        }
        self.evening.shuffle(&mut self.rng);
        let evening: String = self.evening.iter().map(|line| format!("{line} ")).collect();
        format!(
            "Day {day} at {name}.\n{keeper} {opening} {list} {prices}.\n{middle}\n{evening}Then {keeper} {closing} \
             So ended day {day} at {name}.",
            name = place.name,
            opening = place.opening,
            list = place.list,
            prices = prices.join(", "),
            middle = middle.join(" "),
            closing = place.closing,
        )
    }

    /// Somebody of the town with what everybody knows of them: it depends on the name alone.
    fn person(&mut self) -> String {
        let (name, surname) =
            (self.rng.random_range(0..NAMES.len()), self.rng.random_range(0..SURNAMES.len()));
        let mut known = ChaCha8Rng::seed_from_u64((name * SURNAMES.len() + surname) as u64);
        format!(
            "{} {} of {}, the {}, passed by, who keeps {} and plays the {}.",
            NAMES[name],
            SURNAMES[surname],
            STREETS[known.random_range(0..STREETS.len())],
            TRADES[known.random_range(0..TRADES.len())],
            ANIMALS[known.random_range(0..ANIMALS.len())],
            INSTRUMENTS[known.random_range(0..INSTRUMENTS.len())],
        )
    }

    fn visitor(&mut self) -> &'static str {
        self.visitors.pop().unwrap_or("Mara")
    }

    /// Two different entries of the list.
    fn two_prices(&mut self) -> [(&'static str, u32); 2] {
        let first = self.rng.random_range(0..self.prices.len());
        let second = (first + self.rng.random_range(1..self.prices.len())) % self.prices.len();
        [self.prices[first], self.prices[second]]
    }

    fn lookup(&mut self) -> String {
        let (visitor, [(good, price), _]) = (self.visitor(), self.two_prices());
        let unit = self.place.unit;
        format!(
            "{visitor} came in and asked about the {good}. {} looked at the list: {good}, {price} {unit}.",
            self.keeper
        )
    }

    fn sum(&mut self) -> String {
        let (visitor, [(first, a), (second, b)]) = (self.visitor(), self.two_prices());
        let unit = self.place.unit;
        format!("{visitor} wanted {first} and {second}. That made {a} + {b} = {} {unit} in all.", a + b)
    }

    fn comparison(&mut self) -> String {
        let (visitor, [(first, a), (second, b)]) = (self.visitor(), self.two_prices());
        let answer = match a.cmp(&b) {
            std::cmp::Ordering::Less => format!("The {second}, for {b} is more than {a}"),
            std::cmp::Ordering::Equal => format!("Neither, for both are {a}"),
            std::cmp::Ordering::Greater => format!("The {first}, for {a} is more than {b}"),
        };
        format!(
            "\"Which is more, the {first} or the {second}?\" asked {visitor}. \"{answer},\" said {}.",
            self.keeper
        )
    }

    fn parcel(&mut self) -> String {
        let visitor = self.visitor();
        let mut letter = || char::from(self.rng.random_range(b'A'..=b'Z'));
        let letters = [letter(), letter()].iter().collect::<String>();
        let mark = format!("{letters}-{}", self.rng.random_range(1000..10_000));
        self.evening.push(format!(
            "In the evening {visitor} came for the parcel. \"{mark},\" read {} and handed it over.",
            self.keeper
        ));
        format!("A parcel came for {visitor}, and the mark on it was {mark}.")
    }

    fn parrot(&mut self) -> String {
        let mut things = THINGS;
        things.shuffle(&mut self.rng);
        let phrases: Vec<String> = things[..3]
            .iter()
            .map(|thing| format!("{} {thing}", COLOURS.choose(&mut self.rng).unwrap_or(&"red")))
            .collect();
        let words = phrases.join(", ");
        let visitor = self.visitor();
        self.evening.push(format!("The parrot still said: \"{words}!\""));
        format!("{visitor} taught the parrot to say: \"{words}!\"")
    }

    fn sorting(&mut self) -> String {
        let count = self.rng.random_range(3..=5);
        let mut numbers: Vec<u32> = (0..count).map(|_| self.rng.random_range(10..100)).collect();
        let list = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let unsorted = list(&numbers);
        numbers.sort_unstable();
        format!("{} put the tickets {unsorted} in order: {}.", self.keeper, list(&numbers))
    }

    fn raffle(&mut self) -> String {
        let (number, winner) = (self.rng.random_range(100..1000), self.visitor());
        self.evening.push(format!("{winner} came back once more, still happy about number {number}."));
        format!("The number drawn in the raffle was {number}, and it was {winner} who won.")
    }

    fn clock(&mut self) -> String {
        let hour = self.rng.random_range(2..=COUNTS.len());
        format!("The clock struck {}: {}.", COUNTS[hour - 1], COUNTS[..hour].join(", "))
    }
}

/// Trains a byte-level BPE with single digits; the text starts with [`BOUNDARY`] where special tokens are added.
///
/// # Errors
/// A `vocab_size` that does not hold the 256 bytes and the boundary.
pub fn train_tokenizer(documents: &[String], vocab_size: usize) -> Result<Tokenizer> {
    anyhow::ensure!(vocab_size > 256, "expected a vocabulary of at least 257 tokens, found {vocab_size}");
    let byte_level = ByteLevel::new(false, false, true);
    let split: Vec<PreTokenizerWrapper> = vec![Digits::new(true).into(), byte_level.into()];
    let framing = TemplateProcessing::builder()
        .try_single(format!("{BOUNDARY} $A"))
        .map_err(Error::msg)?
        .special_tokens(vec![(BOUNDARY, 0)])
        .build()?;
    let mut tokenizer = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(Sequence::new(split)))
        .with_post_processor(Some(framing))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(Error::from_boxed)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(BOUNDARY, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, documents.iter()).map_err(Error::from_boxed)?;
    Ok(tokenizer.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_text_and_another_seed_another() {
        let text = documents(7, 40);
        assert_eq!(text, documents(7, 40));
        assert_eq!(text[..10], documents(7, 10));
        assert_ne!(text, documents(8, 40));
        let distinct: std::collections::HashSet<_> = text.iter().collect();
        assert_eq!(distinct.len(), text.len());
    }

    #[test]
    fn the_hard_parts_are_right() {
        let text = documents(1, 400);
        let mut sums = 0;
        for document in &text {
            for (at, _) in document.match_indices(" + ") {
                let before = document[..at].rsplit(' ').next().unwrap();
                let mut after = document[at + 3..].split(' ');
                let b: u32 = after.next().unwrap().parse().unwrap();
                assert_eq!(after.next(), Some("="));
                let sum: u32 = after.next().unwrap().parse().unwrap();
                assert_eq!(before.parse::<u32>().unwrap() + b, sum, "{document}");
                sums += 1;
            }
            if let Some((_, rest)) = document.split_once("the mark on it was ") {
                let mark = rest.split('.').next().unwrap();
                assert_eq!(document.matches(mark).count(), 2, "{document}");
            }
            if let Some((_, rest)) = document.split_once(" in order: ") {
                let list = rest.split('.').next().unwrap();
                let numbers: Vec<u32> = list.split(", ").map(|number| number.parse().unwrap()).collect();
                assert!(numbers.is_sorted(), "{document}");
            }
        }
        assert!(sums > 50, "only {sums} sums");
    }

    #[test]
    fn what_is_known_of_a_person_is_the_same_everywhere() {
        let mut known = std::collections::HashMap::new();
        let mut again = 0;
        for document in documents(1, 400).iter().chain(&documents(2, 400)) {
            for (at, _) in document.match_indices(", passed by, who keeps ") {
                let start = document[..at].rfind(['.', '\n']).map_or(0, |dot| dot + 1);
                let sentence = &document[start..][..document[start..].find('.').unwrap()];
                let (name, rest) = sentence.trim().split_once(" of ").unwrap();
                if let Some(before) = known.insert(name.to_owned(), rest.to_owned()) {
                    assert_eq!(before, rest, "{name}");
                    again += 1;
                }
            }
        }
        assert!(again > 500, "only {again} people met twice");
    }

    #[test]
    fn the_tokenizer_gives_the_text_back() {
        let text = documents(3, 300);
        let tokenizer = train_tokenizer(&text, 512).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), 512);
        assert_eq!(tokenizer.token_to_id(BOUNDARY), Some(0));
        for document in documents(4, 50).iter().map(String::as_str).chain(["  Ünïcode 🦀\n\ttoo  ", ""]) {
            let ids = tokenizer.encode(document, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), document);
        }
    }

    #[test]
    fn digits_stand_alone_and_text_starts_with_the_boundary() {
        let tokenizer = train_tokenizer(&documents(3, 300), 1024).unwrap();
        for (token, id) in tokenizer.get_vocab(false) {
            let digits = token.chars().filter(char::is_ascii_digit).count();
            assert!(digits == 0 || token.len() == 1, "token {id} is {token:?}");
        }
        let encoding = tokenizer.encode("Day 214", true).unwrap();
        assert_eq!(encoding.get_ids()[0], 0);
    }

    #[test]
    fn training_a_tokenizer_twice_gives_the_same_file() {
        let text = documents(5, 100);
        let train = || train_tokenizer(&text, 600).unwrap().to_string(false).unwrap();
        assert_eq!(train(), train());
        assert!(train_tokenizer(&text, 256).is_err());
    }
}
