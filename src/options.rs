//! Grammar of option values: `key=value,...` lists, sizes (`256M`) and times (`60s`).
//!
//! A device's configuration is one serde struct. It is read from JSON (config file, API) and, through [`from_str`],
//! from a command-line value, so both accept the same keys and refuse the same ones.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Error in an option value. It displays as one sentence without the option's name.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    /// Replaces the list of valid keys by `hint` if the error is about the unknown key `key`.
    pub(crate) fn hint_for_key(self, key: &str, hint: &str) -> Self {
        let is_about = self.0.starts_with(&format!("unknown key '{key}'"));
        if is_about { Error(format!("unknown key '{key}'; {hint}")) } else { self }
    }
}

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

/// Parses `key=value,key,...` into `T`. A first item without `=` is the value of `first`, if `first` is given. Any
/// other item without `=` is a switch that is turned on. A comma inside a value is doubled. A key that takes a list is
/// repeated for each value.
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
            let what = if text.ends_with(',') { "there is nothing after the last comma" } else { "an item is empty" };
            return Err(Error(format!("{what}; write key=value,key=value")));
        }
        if pair.1.as_deref() == Some("") {
            return Err(Error(format!("'{}' is empty", pair.0)));
        }
        items.push(pair);
    }
    T::deserialize(Pairs { items: items.into(), value: None })
}

/// Splits at single commas; `,,` stands for a literal comma.
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

/// Value of one pair, where `None` is a bare switch, and the source of more values for the same key.
struct Value<'a>(Option<String>, Option<More<'a>>);

struct More<'a> {
    key: &'a str,
    items: &'a mut VecDeque<Item>,
}

impl More<'_> {
    /// Takes the remaining values of the key.
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

/// Number of bytes: `4096`, `512K`, `256M`, `1.5G`, `1T` (powers of 1024; `KiB`, `KB` and lower case mean the same).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// Returns a size of `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Size(n << 20)
    }

    /// Returns the end of a message about a wrong size, if the unit may have been forgotten.
    pub(crate) fn unit_hint(self) -> String {
        match self.0 {
            n @ 1..0x10_0000 => format!("; a size without a unit is in bytes: for MiB write {n}M"),
            _ => String::new(),
        }
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error(format!("'{text}' is not a size; write bytes or a number with K, M, G or T, like 256M"));
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (number, unit) = text.split_at(digits);
        let (number, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let shift: u32 = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(bad()),
        };
        if number.is_empty() || fraction.is_empty() || fraction.contains('.') {
            return Err(bad());
        }
        let too_large = || Error(format!("'{text}' is larger than any address space"));
        let number: u64 = number.parse().map_err(|_| too_large())?;
        let whole = number.checked_mul(1 << shift).ok_or_else(too_large)?;
        let uneven = || Error(format!("'{text}' is not a whole number of bytes; write it in a smaller unit"));
        whole.checked_add(part(fraction, shift).ok_or_else(uneven)?).map(Size).ok_or_else(too_large)
    }
}

/// Returns the decimal fraction `digits` of 2 to the power of `shift`, if that is a whole number.
fn part(digits: &str, shift: u32) -> Option<u64> {
    let digits = digits.trim_end_matches('0');
    let scale = 10u128.checked_pow(digits.len() as u32)?;
    let digits: u128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    // The digits are less than the scale, so the quotient is less than 2 to the power of `shift`.
    let scaled = digits.checked_mul(1 << shift)?;
    if scaled.is_multiple_of(scale) { u64::try_from(scaled / scale).ok() } else { None }
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

/// Length of time: `90s`, `500ms`, `2m`, `1h30m`; a bare number means seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error(format!("'{text}' is not a time; write a number with ms, s, m or h, like 60s or 1h30m"));
        let is_number = |c: char| c.is_ascii_digit() || c == '.';
        let (mut rest, mut seconds, mut smallest) = (text, 0.0, f64::INFINITY);
        loop {
            let unit = rest.trim_start_matches(is_number);
            let number: f64 = rest[..rest.len() - unit.len()].parse().map_err(|_| bad())?;
            rest = unit.trim_start_matches(|c| !is_number(c));
            let factor = match &unit[..unit.len() - rest.len()] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" | "min" => 60.0,
                "h" => 3600.0,
                "" if smallest.is_infinite() => 1.0,
                _ => return Err(bad()),
            };
            if factor >= smallest {
                return Err(bad());
            }
            (seconds, smallest) = (seconds + number * factor, factor);
            if rest.is_empty() {
                break;
            }
        }
        // A year is far beyond any use and far below the values at which timers overflow.
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
        assert_eq!(disk("x,").unwrap_err(), "there is nothing after the last comma; write key=value,key=value");
        for (text, key) in [("", "path"), ("path=", "path"), ("x,size=", "size"), ("x,mode=,readonly", "mode")] {
            assert_eq!(disk(text).unwrap_err(), format!("'{key}' is empty"));
        }
        let hinted = from_str::<Disk>("eth0", None).unwrap_err().hint_for_key("eth0", "write tap=eth0");
        assert_eq!(hinted.to_string(), "unknown key 'eth0'; write tap=eth0");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("1k", 1024), ("256M", 256 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes), "{text}");
        }
        for (text, bytes) in [("1.5G", 1536 << 20), ("0.25M", 256 << 10), ("2.0", 2), ("1.50T", 1536 << 30)] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes), "{text}");
        }
        let long = format!("1.{}G", "3".repeat(60));
        for text in [
            "",
            "M",
            "1X",
            "-1",
            "1.5",
            "1.G",
            ".5G",
            "1.2.3G",
            "0.3G",
            &long,
            "99999999999T",
            "16777216T",
            "16777215.99999999T",
            "99999999999999999999",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        let uneven = "1.1G".parse::<Size>().unwrap_err().to_string();
        assert_eq!(uneven, "'1.1G' is not a whole number of bytes; write it in a smaller unit");
        assert_eq!(Size(512).unit_hint(), "; a size without a unit is in bytes: for MiB write 512M");
        assert_eq!(Size::mib(1).unit_hint(), "");
        assert_eq!(Size::mib(256).to_string(), "256M");
        assert_eq!(Size(1000).to_string(), "1000");
    }

    #[test]
    fn times() {
        for (text, ms) in [
            ("60s", 60_000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1.5", 1500),
            ("1h30m", 5_400_000),
            ("1m0.5s", 60_500),
            ("2h3m4s5ms", 7_384_005),
        ] {
            assert_eq!(text.parse::<Span>().unwrap().0, Duration::from_millis(ms), "{text}");
        }
        for text in [
            "",
            "s",
            "1d",
            "-1s",
            "nan",
            "1e9h",
            "99999h",
            ".",
            "1h30",
            "30m1h",
            "1s1s",
            "1h m",
            "1 h",
            "8000h800h",
            "1h-1m",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
