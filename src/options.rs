//! The grammar of option values: `key=value,...` lists, sizes (`256M`) and times (`60s`).
//!
//! A device's configuration is one serde struct. The same struct is read from JSON (config file, API) and,
//! through [`from_str`], from a command-line value, so both know the same keys and refuse the same ones.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Why an option value could not be understood. Displays as one sentence without the option's name.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl de::Error for Error {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Error(msg.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Error(format!("unknown key '{field}'; valid keys are {}", expected.join(", ")))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Error(format!("unknown value '{variant}'; valid values are {}", expected.join(", ")))
    }

    fn missing_field(field: &'static str) -> Self {
        Error(format!("'{field}=' is missing"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Error(format!("'{field}' is given twice"))
    }
}

/// Parses `key=value,key,...` into `T`. A first item without `=` is the value of `first`, when there is such a key;
/// any other item without `=` is a switch that is turned on. A comma inside a value is written twice. A key that
/// takes a list is given once for each of its values.
pub fn from_str<T: DeserializeOwned>(text: &str, first: Option<&'static str>) -> Result<T, Error> {
    let mut items = Vec::new();
    for (i, item) in split(text).into_iter().enumerate() {
        let pair = match item.split_once('=') {
            Some((key, value)) => (key.to_string(), Some(value.to_string())),
            None => match first {
                Some(key) if i == 0 => (key.to_string(), Some(item)),
                _ => (item, None),
            },
        };
        if pair.0.is_empty() {
            return Err(Error("an item is empty; write key=value,key=value".into()));
        }
        items.push(pair);
    }
    T::deserialize(Pairs { items: items.into(), value: None })
}

/// Splits at single commas; `,,` stands for a comma.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                items.last_mut().unwrap_or(&mut String::new()).push(',');
            }
            ',' => items.push(String::new()),
            c => items.last_mut().unwrap_or(&mut String::new()).push(c),
        }
    }
    items
}

type Item = (String, Option<String>);

struct Pairs {
    items: VecDeque<Item>,
    value: Option<(String, Option<String>)>,
}

impl<'de> Deserializer<'de> for Pairs {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Pairs {
    type Error = Error;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.items.pop_front() else { return Ok(None) };
        self.value = Some((key.clone(), value));
        seed.deserialize(key.into_deserializer()).map(Some)
    }

    fn next_value_seed<V: de::DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (key, value) = self.value.take().ok_or_else(|| Error("value without key".into()))?;
        let more = More { key: &key, items: &mut self.items };
        seed.deserialize(Value(value, Some(more))).map_err(|e| Error(format!("{key}: {e}")))
    }
}

/// One value of a pair, where `None` is a bare switch, and where more values of the same key may be.
struct Value<'a>(Option<String>, Option<More<'a>>);

struct More<'a> {
    key: &'a str,
    items: &'a mut VecDeque<Item>,
}

impl More<'_> {
    /// Takes the values of the key that are left.
    fn take(self) -> Vec<Value<'static>> {
        let (same, others) = self.items.drain(..).partition::<VecDeque<_>, _>(|(key, _)| key == self.key);
        *self.items = others;
        same.into_iter().map(|(_, value)| Value(value, None)).collect()
    }
}

impl<'de> IntoDeserializer<'de, Error> for Value<'static> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl Value<'_> {
    fn text(self) -> Result<String, Error> {
        self.0.ok_or_else(|| Error("needs a value".into()))
    }

    fn number<T: FromStr>(self) -> Result<T, Error> {
        let text = self.text()?;
        text.parse().map_err(|_| Error(format!("'{text}' is not a number in range")))
    }
}

macro_rules! numbers {
    ($($deserialize:ident $visit:ident)*) => {$(
        fn $deserialize<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.number()?)
        }
    )*};
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.text()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(match self.0.as_deref() {
            None | Some("on" | "true" | "yes") => true,
            Some("off" | "false" | "no") => false,
            Some(other) => return Err(Error(format!("'{other}' is neither on nor off"))),
        })
    }

    numbers! {
        deserialize_u8 visit_u8  deserialize_u16 visit_u16  deserialize_u32 visit_u32  deserialize_u64 visit_u64
        deserialize_i8 visit_i8  deserialize_i16 visit_i16  deserialize_i32 visit_i32  deserialize_i64 visit_i64
        deserialize_f64 visit_f64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text: de::value::StringDeserializer<Error> = self.text()?.into_deserializer();
        text.deserialize_enum(name, variants, visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, Error> {
        let more = self.1.take().map(More::take).unwrap_or_default();
        let values = std::iter::once(Value(self.0, None)).chain(more);
        visitor.visit_seq(de::value::SeqDeserializer::new(values))
    }

    serde::forward_to_deserialize_any! {
        i128 u128 f32 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct
        identifier ignored_any
    }
}

/// A number of bytes: `4096`, `512K`, `256M`, `2G`, `1T` (powers of 1024; `KiB`, `KB` and lower case mean the same).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Size(n << 20)
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error(format!("'{text}' is not a size; write bytes or a number with K, M, G or T, like 256M"));
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(bad()),
        };
        if number.is_empty() {
            return Err(bad());
        }
        let too_large = || Error(format!("'{text}' is larger than any address space"));
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(too_large)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A length of time: `90s`, `500ms`, `2m`, `1h`; a bare number is seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error(format!("'{text}' is not a time; write a number with ms, s, m or h, like 60s"));
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (number, unit) = text.split_at(digits);
        let factor = match unit {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            _ => return Err(bad()),
        };
        let number: f64 = number.parse().map_err(|_| bad())?;
        // A year is far beyond any use and far below what timers overflow at.
        let seconds = number * factor;
        if !(0.0..=31_536_000.0).contains(&seconds) {
            return Err(Error(format!("'{text}' is longer than a year")));
        }
        Ok(Span(Duration::from_secs_f64(seconds)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        if ms.is_multiple_of(1000) { write!(f, "{}s", ms / 1000) } else { write!(f, "{ms}ms") }
    }
}

macro_rules! serde_as_text_or_number {
    ($type:ident, $number:expr, $what:literal) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                struct V;
                impl Visitor<'_> for V {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_u64<E: de::Error>(self, v: u64) -> Result<$type, E> {
                        $number(v).map_err(E::custom)
                    }
                    fn visit_str<E: de::Error>(self, v: &str) -> Result<$type, E> {
                        v.parse().map_err(E::custom)
                    }
                }
                d.deserialize_any(V)
            }
        }
    };
}

serde_as_text_or_number!(Size, |v| Ok::<_, Error>(Size(v)), "a size like \"256M\" or a number of bytes");
serde_as_text_or_number!(Span, |v: u64| v.to_string().parse::<Span>(), "a time like \"60s\" or a number of seconds");

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Disk {
        path: String,
        #[serde(default)]
        readonly: bool,
        size: Option<Size>,
        queues: Option<u16>,
        #[serde(default)]
        mode: Mode,
    }

    #[derive(Deserialize, Debug, Default, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        #[default]
        Auto,
        Sync,
    }

    fn disk(text: &str) -> Result<Disk, String> {
        from_str(text, Some("path")).map_err(|e| e.to_string())
    }

    #[test]
    fn first_item_switches_and_doubled_commas() {
        let d = disk("a,,b.img,readonly,size=2M,queues=4,mode=sync").unwrap();
        let want = Disk {
            path: "a,b.img".into(),
            readonly: true,
            size: Some(Size::mib(2)),
            queues: Some(4),
            mode: Mode::Sync,
        };
        assert_eq!(d, want);
        assert!(!disk("path=x,readonly=off").unwrap().readonly);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(
            disk("x,sizes=1").unwrap_err(),
            "unknown key 'sizes'; valid keys are path, readonly, size, queues, mode"
        );
        assert_eq!(disk("x,mode=warp").unwrap_err(), "mode: unknown value 'warp'; valid values are auto, sync");
        assert_eq!(disk("x,readonly=maybe").unwrap_err(), "readonly: 'maybe' is neither on nor off");
        assert_eq!(disk("x,queues=70000").unwrap_err(), "queues: '70000' is not a number in range");
        assert_eq!(disk("x,path=y").unwrap_err(), "'path' is given twice");
        assert_eq!(disk("readonly=on").unwrap_err(), "'path=' is missing");
        assert_eq!(disk("x,queues").unwrap_err(), "queues: needs a value");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("1k", 1024), ("256M", 256 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes), "{text}");
        }
        for text in ["", "M", "1X", "-1", "1.5G", "99999999999T", "16777216T", "99999999999999999999"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size::mib(256).to_string(), "256M");
        assert_eq!(Size(1000).to_string(), "1000");
    }

    #[test]
    fn times() {
        for (text, ms) in [("60s", 60_000), ("500ms", 500), ("2m", 120_000), ("1.5", 1500)] {
            assert_eq!(text.parse::<Span>().unwrap().0, Duration::from_millis(ms), "{text}");
        }
        for text in ["", "s", "1d", "-1s", "nan", "1e9h", "99999h", "."] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
