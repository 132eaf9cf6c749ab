package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/conformance"
)

// The self-test runs the suite's cases, in and between processes, and says how each ended.
func TestSelftest(t *testing.T) {
	status, out, errs := ringside("doctor", "--selftest", "--device", "soft0", "--run", "^(rc/send-imm|ud/.*|kill/idle|remote/wrong-rkey)$", "-o", "json")
	if status != 0 {
		t.Fatalf("status %d: %s\n%s", status, errs, out)
	}
	var r struct {
		Devices  struct{ Devices []struct{ Name string } }
		Selftest *selftestReport
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(r.Devices.Devices, struct{ Name string }{"soft0"}) {
		t.Errorf("devices %+v", r.Devices)
	}
	s := r.Selftest
	if s == nil || s.Device != "soft0" || s.Failed != 0 || s.Passed < 8 || s.Passed+s.Skipped != len(s.Results) {
		t.Fatalf("self-test %+v", s)
	}
	passed := map[string]map[string]int{} // case, path
	for _, res := range s.Results {
		if res.Outcome == conformance.Passed {
			if passed[res.Case] == nil {
				passed[res.Case] = map[string]int{}
			}
			passed[res.Case][res.Path]++
		}
	}
	if p := passed["rc/send-imm"]; p["in-process"] != 1 || p["processes"] != 2 {
		t.Errorf("rc/send-imm has passed %v", p)
	}
	for _, name := range []string{"kill/idle", "remote/wrong-rkey"} {
		if passed[name]["processes"] == 0 {
			t.Errorf("%s has passed %v", name, passed[name])
		}
	}
}

// Failures, early ends and reasons of skips are told, and the status says so.
func TestSelftestReport(t *testing.T) {
	r := doctorReport{Version: versionInfo{Version: "v1"}, Devices: &deviceReport{}, Findings: []finding{{true, "broken: mend it"}, {false, "good to know"}},
		Selftest: &selftestReport{Device: "mlx5_0", PeerDevice: "mlx5_1", Passed: 1, Failed: 1, Skipped: 2, Results: []conformance.Result{
			{Case: "rc/a", Path: "processes", Outcome: conformance.Failed, Log: "cases_x.go:7: bad\nworse\n"},
			{Case: "rc/b", Path: "processes", Outcome: conformance.Passed},
			{Case: "mw/c", Path: "in-process", Outcome: conformance.Skipped, Reason: "the device does not have mw2"},
			{Case: "mw/c", Path: "processes", Outcome: conformance.Skipped, Reason: "the device does not have mw2"},
		}}}
	var b strings.Builder
	if err := r.write(&b, "text"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"problem: broken: mend it\n", "note: good to know\n", "self-test of mlx5_0 and mlx5_1: 1 passed, 1 failed, 2 skipped",
		"  FAILED rc/a, processes\n    cases_x.go:7: bad\n    worse\n", "2 skipped:  the device does not have mw2"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, b.String())
		}
	}
	if err := r.verdict(); err == nil || !strings.Contains(err.Error(), "1 of 2 cases failed") {
		t.Errorf("verdict %v", err)
	}
	r.Selftest.Error = "interrupted"
	if err := r.verdict(); err == nil || !strings.Contains(err.Error(), "mlx5_0 ended early") {
		t.Errorf("verdict %v", err)
	}
	b.Reset()
	if err := r.write(&b, "text"); err != nil || !strings.Contains(b.String(), "ended early: interrupted\n") {
		t.Errorf("error %v:\n%s", err, b.String())
	}
}

func TestDoctorMistakes(t *testing.T) {
	if status, _, errs := ringside("doctor", "--run", "("); status != 2 || !strings.Contains(errs, "--run") {
		t.Errorf("status %d: %s", status, errs)
	}
	if status, _, errs := ringside("doctor", "--selftest", "--device", "nosuch0"); status != 1 || !strings.Contains(errs, "nosuch0") {
		t.Errorf("status %d: %s", status, errs)
	}
}

// Whatever is wrong is said once, however many devices and providers meet it, and wherever it was found.
func TestDoctorSaysItOnce(t *testing.T) {
	devices := &deviceReport{
		Problems: []string{
			"provider mlx5: no uverbs files: load ib_uverbs", "provider rxe: no uverbs files: load ib_uverbs",
			"verbs: open_device: no such device\nprovider mlx5 (hardware): no uverbs files: load ib_uverbs\n" +
				"provider rxe (kernel software): no uverbs files: load ib_uverbs\nsiw0 (kernel software): open_device on siw0: not yours",
		},
		Devices: []deviceJSON{
			{Name: "siw0", Provider: "siw", Error: "open_device on siw0: not yours"},
			{Name: "siw1", Provider: "siw", Error: "open_device on siw1: not yours"},
		},
	}
	want := []string{"provider mlx5, provider rxe: no uverbs files: load ib_uverbs", "verbs: open_device: no such device",
		"siw0: open_device on siw0: not yours", "siw1: open_device on siw1: not yours"}
	got := problemsOf(devices)
	if !slices.Equal(got, want) {
		t.Errorf("problems %q, want %q", got, want)
	}
	r := doctorReport{Devices: devices}
	for _, text := range got {
		r.Findings = append(r.Findings, finding{true, text})
	}
	var b strings.Builder
	if err := r.write(&b, "text"); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"no uverbs files", "no such device", "on siw0: not yours", "on siw1: not yours"} {
		if n := strings.Count(b.String(), text); n != 1 {
			t.Errorf("%q is said %d times in:\n%s", text, n, b.String())
		}
	}
}

// With a device that there is not, the report comes nevertheless, and once.
func TestDoctorWithoutDevice(t *testing.T) {
	t.Setenv("RINGSIDE_DEVICE", "nosuch0")
	status, out, errs := ringside("doctor", "--selftest")
	if status != 1 || strings.Count(out, "nosuch0: no such device") != 1 || !strings.Contains(errs, "no device to test") || strings.Contains(errs, "nosuch0") {
		t.Errorf("status %d: %s\n%s", status, errs, out)
	}
}
