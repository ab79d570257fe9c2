//! Makes text from a guest or another untrusted program safe to show on a terminal.

/// Replaces characters by U+FFFD in a line of text if they control a terminal, or are invisible and change how others
/// appear. Tabs stay.
pub fn printable(line: &str) -> String {
    line.chars().map(|c| if is_hidden(c) && c != '\t' { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Returns a message of vireo's in which text of a file or a guest may stand: as [`printable`], with all lines but the
/// first indented, so that none of them looks like a message of its own.
pub fn message(text: &str) -> String {
    text.trim_end().lines().map(printable).collect::<Vec<_>>().join("\n  ")
}

/// Returns true if a character has an effect instead of being visible: Unicode's controls (Cc), formats (Cf, including
/// those that change the direction of the text after them), line and paragraph separators (Zl, Zp), and tags.
pub fn is_hidden(c: char) -> bool {
    let format = matches!(c,
        '\u{AD}' | '\u{600}'..='\u{605}' | '\u{61C}' | '\u{6DD}' | '\u{70F}' | '\u{890}'..='\u{891}' | '\u{8E2}'
        | '\u{180E}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}'
        | '\u{FFF9}'..='\u{FFFB}' | '\u{110BD}' | '\u{110CD}' | '\u{13430}'..='\u{1343F}' | '\u{1BCA0}'..='\u{1BCA3}'
        | '\u{1D173}'..='\u{1D17A}' | '\u{E0000}'..='\u{E007F}');
    format || c.is_control()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_seen_is_replaced_and_the_rest_stays() {
        assert_eq!(printable("\x1b[2Jgone\ttab\r\u{9b}K"), "\u{FFFD}[2Jgone\ttab\u{FFFD}\u{FFFD}K");
        for hidden in ['\u{202E}', '\u{2066}', '\u{2069}', '\u{200B}', '\u{200D}', '\u{FEFF}', '\u{2028}', '\u{E0041}']
        {
            assert_eq!(printable(&format!("a{hidden}b")), "a\u{FFFD}b", "{hidden:?}");
        }
        let plain = "Grüße, 日本語, עברית, ελληνικά, 🙂 ~é\u{301}";
        assert_eq!(printable(plain), plain);
    }

    #[test]
    fn a_message_has_one_beginning() {
        assert_eq!(message("no base '\x1b[2J'\nvireo: all is well\r\n"), "no base '\u{FFFD}[2J'\n  vireo: all is well");
        assert_eq!(message("a\tb"), "a\tb");
    }
}
