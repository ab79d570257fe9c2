//! JUnit XML, as far as CI systems read it: a suite of cases, each with its time and, if it failed, the reason.

use std::fmt::Write;

use crate::outcome::EXIT_VIREO_FAILED;

/// One run of a guest.
pub(super) struct Case {
    /// Name of what ran.
    pub name: String,
    /// Duration in seconds.
    pub time: f64,
    /// vireo's exit status: 125 is an error of the test's environment, any other nonzero value a failure of the test.
    pub code: u8,
    /// Outcome in one word.
    pub outcome: String,
    /// Outcome in a sentence.
    pub detail: String,
    /// Last lines that the guest printed.
    pub log: String,
    /// Output of the command, if known.
    pub output: String,
}

/// Returns the whole file.
pub(super) fn suite(cases: &[Case]) -> String {
    let errors = cases.iter().filter(|case| case.code == EXIT_VIREO_FAILED).count();
    let failures = cases.iter().filter(|case| case.code != 0).count() - errors;
    let time: f64 = cases.iter().map(|case| case.time).sum();
    let totals = format!(r#"tests="{}" failures="{failures}" errors="{errors}" time="{time:.3}""#, cases.len());
    let mut text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites {totals}>\n");
    let _ = writeln!(text, "  <testsuite name=\"vireo\" {totals}>");
    for case in cases {
        let name = escaped(&case.name);
        let _ = writeln!(text, "    <testcase name=\"{name}\" classname=\"vireo\" time=\"{:.3}\">", case.time);
        let kind = match case.code {
            0 => None,
            EXIT_VIREO_FAILED => Some("error"),
            _ => Some("failure"),
        };
        if let Some(kind) = kind {
            let (outcome, detail, log) = (escaped(&case.outcome), escaped(&case.detail), escaped(&case.log));
            let _ = writeln!(text, "      <{kind} type=\"{outcome}\" message=\"{detail}\">{log}</{kind}>");
        }
        if !case.output.is_empty() {
            let _ = writeln!(text, "      <system-out>{}</system-out>", escaped(&case.output));
        }
        text += "    </testcase>\n";
    }
    text + "  </testsuite>\n</testsuites>\n"
}

/// Escapes text for XML 1.0 (2.2, 2.4), which cannot represent every character that a guest may print.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            '"' => escaped += "&quot;",
            '\t' | '\n' | ' '..='\u{fffd}' | '\u{10000}'.. => escaped.push(c),
            '\r' => {}
            _ => escaped.push('\u{fffd}'),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite() {
        let case = |name: &str, code, outcome: &str| Case {
            name: name.into(),
            time: 1.5,
            code,
            outcome: outcome.into(),
            detail: "a <\"sentence\"> & more".into(),
            log: "BUG:\u{1b}[0m\r\nend".into(),
            output: if code == 0 { "6.1\n".into() } else { String::new() },
        };
        let text = suite(&[case("uname -r", 0, "exited"), case("x", 70, "panicked"), case("y", 125, "failed")]);
        let expected = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="3" failures="1" errors="1" time="4.500">
  <testsuite name="vireo" tests="3" failures="1" errors="1" time="4.500">
    <testcase name="uname -r" classname="vireo" time="1.500">
      <system-out>6.1
</system-out>
    </testcase>
    <testcase name="x" classname="vireo" time="1.500">
      <failure type="panicked" message="a &lt;&quot;sentence&quot;&gt; &amp; more">BUG:�[0m
end</failure>
    </testcase>
    <testcase name="y" classname="vireo" time="1.500">
      <error type="failed" message="a &lt;&quot;sentence&quot;&gt; &amp; more">BUG:�[0m
end</error>
    </testcase>
  </testsuite>
</testsuites>
"#;
        assert_eq!(text, expected);
    }
}
