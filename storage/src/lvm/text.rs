//! LVM2's configuration text (lvm2 `libdm/libdm-config.c`): sections, numbers, strings, arrays.
//!
//! Guards: nesting, the number of nodes and every loop are bounded; a text is valid UTF-8 or
//! refused. Strings are compared as they stand: names and UUIDs have no escapes.

use alloc::vec::Vec;

use crate::StoreFault;
use crate::meta::reserve;

/// Nodes of one text (ours; 56 bytes each): some 2000 volumes.
const NODES_MAX: usize = 32_768;
/// Nesting; lvm2's own texts have four levels.
const DEPTH_MAX: usize = 8;

/// A value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value<'a> {
    Section,
    Number(u64),
    Text(&'a str),
    /// What stands between the brackets.
    Array(&'a str),
    /// A number with a sign, a fraction, or beyond 64 bits: no field that matters here has one,
    /// and a neighbour's must not spoil the group.
    Odd(&'a str),
}

struct Node<'a> {
    parent: usize,
    key: &'a str,
    value: Value<'a>,
    /// One past the last node inside a section.
    end: usize,
}

/// A parsed text. Node 0 is the root.
pub struct Text<'a> {
    nodes: Vec<Node<'a>>,
}

const BAD: StoreFault = StoreFault::Refused("the LVM metadata text cannot be parsed");

impl<'a> Text<'a> {
    /// Parses a text.
    pub fn parse(bytes: &'a [u8]) -> Result<Text<'a>, StoreFault> {
        // The area's CRC covers a terminating NUL.
        let bytes = bytes.split(|&byte| byte == 0).next().unwrap_or(&[]);
        let source = core::str::from_utf8(bytes).map_err(|_| BAD)?;
        let root = Node { parent: 0, key: "", value: Value::Section, end: 0 };
        // Each node has an equals sign or a brace; strings may have more of them.
        let marks = source.bytes().filter(|byte| matches!(byte, b'=' | b'{')).count();
        let mut text = Text { nodes: reserve(marks.min(NODES_MAX) + 1)? };
        text.nodes.push(root);
        let mut open: Vec<usize> = alloc::vec![0];
        let mut rest = skip(source);
        while !rest.is_empty() {
            let parent = *open.last().ok_or(BAD)?;
            if let Some(after) = rest.strip_prefix('}') {
                if parent == 0 {
                    return Err(BAD);
                }
                open.pop();
                let end = text.nodes.len();
                text.nodes.get_mut(parent).ok_or(BAD)?.end = end;
                rest = skip(after);
                continue;
            }
            let (key, after) = word(rest)?;
            let after = skip(after);
            let (value, after) = if let Some(inside) = after.strip_prefix('{') {
                if open.len() >= DEPTH_MAX {
                    return Err(BAD);
                }
                open.push(text.nodes.len());
                (Value::Section, inside)
            } else {
                value(skip(after.strip_prefix('=').ok_or(BAD)?))?
            };
            if text.nodes.len() == NODES_MAX {
                return Err(StoreFault::Limit(NODES_MAX as u32));
            }
            text.nodes.push(Node { parent, key, value, end: 0 });
            rest = skip(after);
        }
        let end = text.nodes.len();
        text.nodes.get_mut(Text::ROOT).ok_or(BAD)?.end = end;
        if open.len() == 1 { Ok(text) } else { Err(BAD) }
    }

    /// The root section.
    pub const ROOT: usize = 0;

    /// The members of a section: (node, key, value), in order.
    pub fn members(&self, section: usize) -> impl Iterator<Item = (usize, &'a str, Value<'a>)> {
        let end = self.nodes.get(section).map_or(0, |node| node.end);
        let nodes = self.nodes.iter().enumerate().take(end).skip(section + 1);
        nodes
            .filter(move |(_, node)| node.parent == section)
            .map(|(index, node)| (index, node.key, node.value))
    }

    /// The section `key` in `section`.
    pub fn section(&self, section: usize, key: &str) -> Option<usize> {
        self.members(section)
            .find(|&(_, name, value)| name == key && value == Value::Section)
            .map(|(node, _, _)| node)
    }

    pub fn number(&self, section: usize, key: &str) -> Option<u64> {
        match self.members(section).find(|&(_, name, _)| name == key)?.2 {
            Value::Number(number) => Some(number),
            _ => None,
        }
    }

    pub fn string(&self, section: usize, key: &str) -> Option<&'a str> {
        match self.members(section).find(|&(_, name, _)| name == key)?.2 {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The elements of an array; empty when there is none. One that is not a number or string
    /// ends it.
    pub fn array(&self, section: usize, key: &str) -> impl Iterator<Item = Value<'a>> {
        let found = self.members(section).find(|&(_, name, _)| name == key);
        let mut rest = match found {
            Some((_, _, Value::Array(inside))) => skip(inside),
            _ => "",
        };
        core::iter::from_fn(move || {
            let (element, after) = value(rest).ok()?;
            let after = skip(after);
            rest = skip(after.strip_prefix(',').unwrap_or(after));
            Some(element)
        })
    }

    /// Whether an array of strings holds `word`.
    pub fn has(&self, section: usize, key: &str, word: &str) -> bool {
        self.array(section, key).any(|value| value == Value::Text(word))
    }
}

/// Skips blanks and comments.
fn skip(mut text: &str) -> &str {
    loop {
        text = text.trim_ascii_start();
        let Some(comment) = text.strip_prefix('#') else { return text };
        text = comment.find('\n').and_then(|end| comment.get(end..)).unwrap_or("");
    }
}

/// A key: anything up to a blank, `=`, `{`, `}` or `#`.
fn word(text: &str) -> Result<(&str, &str), StoreFault> {
    let ends = |c: char| c.is_ascii_whitespace() || matches!(c, '=' | '{' | '}' | '#' | '"');
    let end = text.find(ends).unwrap_or(text.len());
    if end == 0 { Err(BAD) } else { Ok(text.split_at(end)) }
}

/// A value without sections, and what follows.
fn value(text: &str) -> Result<(Value<'_>, &str), StoreFault> {
    if let Some(inside) = text.strip_prefix('"') {
        let (string, after) = string(inside)?;
        return Ok((Value::Text(string), after));
    }
    if let Some(inside) = text.strip_prefix('[') {
        let mut rest = inside;
        loop {
            let special = rest.find(['"', ']']).ok_or(BAD)?;
            let (before, after) = rest.split_at(special);
            if let Some(quoted) = after.strip_prefix('"') {
                rest = string(quoted)?.1;
                continue;
            }
            let length = inside.len() - rest.len() + before.len();
            let after = after.get(1..).ok_or(BAD)?;
            return Ok((Value::Array(inside.get(..length).ok_or(BAD)?), after));
        }
    }
    let part = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.');
    let end = text.find(|c: char| !part(c)).unwrap_or(text.len());
    let (digits, after) = text.split_at(end);
    match digits.parse() {
        _ if !digits.contains(|c: char| c.is_ascii_digit()) => Err(BAD),
        Ok(number) if !digits.starts_with('+') => Ok((Value::Number(number), after)),
        _ => Ok((Value::Odd(digits), after)),
    }
}

/// The inside of a string whose opening quote is gone, and what follows the closing one.
fn string(text: &str) -> Result<(&str, &str), StoreFault> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Ok((text.get(..at).ok_or(BAD)?, text.get(at + 1..).ok_or(BAD)?)),
            _ => {}
        }
    }
    Err(BAD)
}
