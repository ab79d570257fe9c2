//! Text of a guest's, or of a program that is not trusted, as a terminal and a reader may be shown it.

/// One line of text, in which characters that command a terminal, or are not seen and change how the others are seen, are
/// replaced by U+FFFD. Tabs stay.
pub fn printable(line: &str) -> String {
    line.chars().map(|c| if is_hidden(c) && c != '\t' { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A message of vireo's, in which anything from a file or a guest may stand: as [`printable`], and lines after the first one
/// are indented, so that none of them looks like a message of its own.
pub fn message(text: &str) -> String {
    text.trim_end().lines().map(printable).collect::<Vec<_>>().join("\n  ")
}

/// Whether a character does something rather than be seen: Unicode's controls (Cc), formats (Cf, among them those that
/// change the direction of what follows), separators of lines and paragraphs (Zl, Zp), and tags.
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
