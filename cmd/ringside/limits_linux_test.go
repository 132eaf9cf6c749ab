package main

import (
	"strings"
	"testing"
)

// A limit on locked memory is a problem for whom it binds.
func TestLockedFindings(t *testing.T) {
	soft, rxe, siw := deviceJSON{Provider: "soft"}, deviceJSON{Provider: "rxe"}, deviceJSON{Provider: "siw"}
	for _, tc := range []struct {
		devices []deviceJSON
		limit   uint64
		mayLock bool
		want    string // empty: none
	}{
		{[]deviceJSON{soft}, 8 << 20, false, ""},
		{[]deviceJSON{rxe, soft}, 8 << 20, false, "problem: the limit on locked memory is 8192 KiB"},
		{[]deviceJSON{rxe, soft}, 8 << 20, true, ""},
		{[]deviceJSON{rxe, siw, soft}, 8 << 20, true, "note: the limit on locked memory is 8192 KiB"},
		{[]deviceJSON{siw}, 8 << 20, false, "problem: the limit on locked memory is 8192 KiB"},
		{[]deviceJSON{rxe, siw}, 64 << 20, false, ""},
		{[]deviceJSON{rxe, siw}, 1<<64 - 1, false, ""}, // unlimited
	} {
		got := ""
		for _, f := range lockedFindings(tc.devices, tc.limit, tc.mayLock) {
			kind := "note: "
			if f.Problem {
				kind = "problem: "
			}
			got += kind + f.Text
		}
		if (tc.want == "") != (got == "") || !strings.HasPrefix(got, tc.want) {
			t.Errorf("%+v: %q", tc, got)
		}
	}
}
