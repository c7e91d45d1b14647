#!/bin/sh
# summary.sh LOG...: a line for each test program, the whole log of those that failed, and the sum as the last line.
# A log holds the program's output, in it its `N passed, N failed` lines, and `exit status N` at its end. Lines that begin
# with SKIP say what was left out, and are shown.
exec awk '
    function report() {
        if (!failed && (!passed && !skipped || status != 0)) {
            text = text "exit status " status ", without saying what failed\n"
            failed = 1
        }
        printf "%s", failed ? text : skipped
        sub(/.*\//, "", name); sub(/\.log$/, "", name)
        printf "%-24s %7d passed, %d failed\n", name, passed, failed
        all_passed += passed; all_failed += failed
    }
    FNR == 1 {
        if (NR > 1) report()
        name = FILENAME; text = skipped = ""; status = "unknown"; passed = failed = 0
    }
    { text = text $0 "\n" }
    /^[0-9]+ passed, [0-9]+ failed/ { passed += $1; failed += $3 }
    /^SKIP / { skipped = skipped $0 "\n" }
    /^exit status [0-9]+$/ { status = $3 }
    END {
        report()
        print all_passed + 0 " passed, " all_failed + 0 " failed"
        exit all_failed > 0
    }' "$@"
