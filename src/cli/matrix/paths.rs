//! Paths in a matrix file: relative to the folder of that file.
//!
//! The values are those of exec's flags, each with its own grammar. Only the part that is a path on the host changes.

use std::path::Path;

/// Flags whose value begins with a path.
const LEADING: [&str; 10] =
    ["console-log", "cwd", "disk", "kernel", "log-file", "modules", "pmem", "root", "share", "vmcore"];
/// Flags, each with a key that a path follows.
const AFTER_KEY: [(&str, &str); 6] = [
    ("disk", "path="),
    ("disk", "overlay="),
    ("pmem", "path="),
    ("vhost-user", "socket="),
    ("vsock", "path="),
    ("gdb", "unix:"),
];
/// Words that can stand in place of a path.
const WORDS: [(&str, &str); 2] = [("root", "initramfs"), ("overlay=", "tmp")];
/// Flags that are lists of options, in which a literal comma is doubled.
const LISTS: [&str; 4] = ["disk", "pmem", "vhost-user", "vsock"];

/// Returns the value of `flag` with its relative paths placed below `dir`.
pub fn located(flag: &str, value: &str, dir: &Path) -> String {
    let dir = dir.to_string_lossy();
    if dir.is_empty() {
        return value.into();
    }
    let dir = if LISTS.contains(&flag) { dir.replace(',', ",,") } else { dir.into_owned() };
    let is_word = |place: &str, text: &str| WORDS.contains(&(place, text));
    let join = |place: &str, text: &str| {
        let is_path = !text.is_empty() && !text.starts_with(['/', ',']) && !is_word(place, text);
        if is_path { format!("{}/{text}", dir.trim_end_matches('/')) } else { text.to_string() }
    };
    let keys: Vec<&str> = AFTER_KEY.iter().filter(|(name, _)| *name == flag).map(|(_, key)| *key).collect();
    if !LISTS.contains(&flag) {
        return match keys.iter().find_map(|key| Some((key, value.strip_prefix(key)?))) {
            Some((key, path)) => format!("{key}{}", join(key, path)),
            None if LEADING.contains(&flag) => join(flag, value),
            None => value.into(),
        };
    }
    let mut items = Vec::new();
    for item in split(value) {
        let found = keys.iter().find_map(|key| Some((key, item.strip_prefix(key)?)));
        items.push(match found {
            Some((key, path)) => format!("{key}{}", join(key, path)),
            None if items.is_empty() && LEADING.contains(&flag) && !item.contains('=') => join(flag, item),
            None => item.into(),
        });
    }
    items.join(",")
}

/// Splits a list of options into its items, leaving doubled commas as they are.
fn split(text: &str) -> Vec<&str> {
    let (mut items, mut start, mut at) = (Vec::new(), 0, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b',', Some(b',')) => at += 2,
            (b',', _) => {
                items.push(&text[start..at]);
                at += 1;
                start = at;
            }
            _ => at += 1,
        }
    }
    items.push(&text[start..]);
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_below_the_folder_of_the_file() {
        for (flag, value, expected) in [
            ("kernel", "bzImage", "/m/bzImage"),
            ("kernel", "/boot/vmlinuz", "/boot/vmlinuz"),
            ("share", ".:/work:rw", "/m/.:/work:rw"),
            ("root", "initramfs", "initramfs"),
            ("root", "tree", "/m/tree"),
            ("disk", "a.img,readonly", "/m/a.img,readonly"),
            ("disk", "a,,b.img,overlay=o.qcow2,id=x", "/m/a,,b.img,overlay=/m/o.qcow2,id=x"),
            ("disk", "path=a.img,overlay=tmp", "path=/m/a.img,overlay=tmp"),
            ("disk", "readonly=on,path=a.img", "readonly=on,path=/m/a.img"),
            ("vsock", "cid=3,path=v.sock", "cid=3,path=/m/v.sock"),
            ("vhost-user", "socket=s,type=fs", "socket=/m/s,type=fs"),
            ("gdb", "unix:s", "unix:/m/s"),
            ("gdb", "1234", "1234"),
            ("memory", "1G", "1G"),
            ("console-log", "", ""),
        ] {
            assert_eq!(located(flag, value, Path::new("/m")), expected, "{flag}");
        }
        assert_eq!(located("disk", "a", Path::new("/x,y")), "/x,,y/a");
        assert_eq!(located("kernel", "a", Path::new("")), "a");
        assert_eq!(located("kernel", "a", Path::new("/")), "/a");
    }
}
