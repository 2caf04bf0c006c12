//! The scenario files: finding them, reading their heads, choosing among them.
//!
//! A head line is `#: WORD REST`. Known words: `title` (one sentence), `timeout` (seconds), `needs`
//! (files of build/, by name), `set` (`default`, `slow`, `bench`, `demo`), `storage` (`any` when
//! dom0's own storage can stand in for platter), `machine` (extra parts of the machine), `suites`
//! (where it has a meaning, when not everywhere).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Seconds that a scenario has when its head does not say.
const TIMEOUT_SECONDS: u64 = 240;

/// When a scenario runs unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// In every `rig test`.
    Default,
    /// In `rig test --all`.
    Slow,
    /// In `rig bench`.
    Bench,
    /// In `rig demo`.
    Demo,
}

/// One scenario file's head.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The file's name without `.sh`.
    pub name: String,
    /// What it shows, in a sentence.
    pub title: String,
    /// How long dom0 lets it run.
    pub timeout_seconds: u64,
    /// Files that must lie in build/.
    pub needs: Vec<String>,
    /// When it runs unasked.
    pub set: Set,
    /// Whether dom0's own storage can take platter's place.
    pub any_storage: bool,
    /// Names of the suites it is for; all when empty.
    pub suites: Vec<String>,
    /// Scenarios that name the same parts share a boot.
    pub machine: BTreeSet<String>,
}

impl Scenario {
    /// Reads a scenario's head.
    ///
    /// # Errors
    /// On an unknown head word or value: a mistyped head must not drop a scenario in silence.
    pub fn parse(name: &str, body: &str) -> Result<Self> {
        let mut scenario = Scenario {
            name: name.to_owned(),
            title: String::new(),
            timeout_seconds: TIMEOUT_SECONDS,
            needs: Vec::new(),
            set: Set::Default,
            any_storage: false,
            suites: Vec::new(),
            machine: BTreeSet::new(),
        };
        for line in body.lines().filter_map(|line| line.strip_prefix("#: ")) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "title" => scenario.title = rest.to_owned(),
                "timeout" => scenario.timeout_seconds = rest.trim().parse()?,
                "needs" => scenario.needs.extend(rest.split_whitespace().map(str::to_owned)),
                "machine" => scenario.machine.extend(rest.split_whitespace().map(str::to_owned)),
                "suites" => scenario.suites.extend(rest.split_whitespace().map(str::to_owned)),
                "storage" if rest == "any" => scenario.any_storage = true,
                "set" => scenario.set = parse_set(rest)?,
                _ => bail!("scenario {name}: unknown head line `{line}`"),
            }
        }
        if scenario.title.is_empty() {
            bail!("scenario {name} has no title");
        }
        Ok(scenario)
    }

    /// Whether `word` means this scenario: its name, its number, or the name without the number.
    fn is_called(&self, word: &str) -> bool {
        let (number, rest) = self.name.split_once('-').unwrap_or((&self.name, ""));
        word == self.name || word == number || word == rest
    }
}

fn parse_set(word: &str) -> Result<Set> {
    match word {
        "default" => Ok(Set::Default),
        "slow" => Ok(Set::Slow),
        "bench" => Ok(Set::Bench),
        "demo" => Ok(Set::Demo),
        _ => bail!("unknown set `{word}`"),
    }
}

/// All scenarios of a folder, in the order of their numbers.
///
/// # Errors
/// When the folder or a file cannot be read, or a head is wrong.
pub fn all(folder: &Path) -> Result<Vec<Scenario>> {
    let mut names = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?;
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".sh").map(str::to_owned));
    }
    let number = |name: &String| name.split('-').next().and_then(|word| word.parse::<u32>().ok());
    names.sort_by_key(|name| (number(name), name.clone()));
    let read = |name: String| {
        let body = fs::read_to_string(folder.join(format!("{name}.sh")))?;
        Scenario::parse(&name, &body)
    };
    names.into_iter().map(read).collect()
}

/// The scenarios that `words` name or, without any, those of the sets.
///
/// # Errors
/// When a word names no scenario.
pub fn choose(all: Vec<Scenario>, words: &[String], sets: &[Set]) -> Result<Vec<Scenario>> {
    for word in words {
        if !all.iter().any(|scenario| scenario.is_called(word)) {
            let names: Vec<&str> = all.iter().map(|scenario| scenario.name.as_str()).collect();
            bail!("no scenario is called {word}; there are: {}", names.join(" "));
        }
    }
    let wanted = |scenario: &Scenario| match words.is_empty() {
        true => sets.contains(&scenario.set),
        false => words.iter().any(|word| scenario.is_called(word)),
    };
    Ok(all.into_iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    //! Would miss: a scenario whose shell part is wrong; only running it shows that.
    use super::*;

    #[test]
    fn a_head_is_read_and_a_wrong_one_refused() {
        let body = "#: title Two guests\n#: timeout 40\n#: needs a.elf b.elf\n#: set slow\n";
        let scenario = Scenario::parse("20-two", body).unwrap();
        assert_eq!(scenario.timeout_seconds, 40);
        assert_eq!(scenario.needs, ["a.elf", "b.elf"]);
        assert_eq!(scenario.set, Set::Slow);
        assert!(scenario.is_called("20") && scenario.is_called("two"));
        assert!(!scenario.is_called("2"));
        assert!(Scenario::parse("x", "#: title t\n#: timeuot 3\n").is_err());
        assert!(Scenario::parse("x", "").is_err());
    }

    #[test]
    fn every_scenario_of_the_checkout_has_a_right_head() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        assert!(all(&folder).unwrap().iter().any(|scenario| scenario.set == Set::Demo));
    }
}
