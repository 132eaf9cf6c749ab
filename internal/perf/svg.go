package perf

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// WritePlot draws the results as an SVG picture: latency percentiles or rates by message size, on logarithmic axes. A
// latency test with one size is drawn as its distribution instead: latency by percentile.
func (r *Report) WritePlot(w io.Writer) error {
	c := r.chart()
	if c == nil {
		return fmt.Errorf("nothing to plot: the run was stopped before it had a result")
	}
	return c.write(w)
}

// chart returns the picture to draw, or nil if there are no results.
func (r *Report) chart() *chart {
	c := &chart{
		title:    r.Test.title(),
		subtitle: fmt.Sprintf("%s to %s, path %s; %s, %d cores; %s", r.Client.Device, r.Server.Device, r.Path, r.Client.CPU, r.Client.Cores, r.Test.settings()),
		x:        bytesAxis,
	}
	var done []*Result
	for i := range r.Results {
		if r.Results[i].Messages > 0 {
			done = append(done, &r.Results[i])
		}
	}
	if len(done) == 0 {
		return nil
	}
	slices.SortStableFunc(done, func(a, b *Result) int { return a.Size - b.Size })
	switch {
	case r.Test.Kind == Lat && len(done) == 1 && done[0].Latency != nil && len(done[0].Latency.curve) > 1:
		l := done[0].Latency
		c.title += fmt.Sprintf(", %d bytes", done[0].Size)
		c.x, c.xLabel = percentileAxis, fmt.Sprintf("percentile of %d measurements", done[0].Messages)
		c.y, c.yLabel = timeAxis, "latency ("+latencyTitles[r.Test.LatencyOf]+")"
		s := series{name: "latency"}
		for _, p := range l.curve {
			s.points = append(s.points, point{100 / (100 - p.percentile), p.ns})
		}
		c.series = []series{s}
	case r.Test.Kind == Lat:
		c.xLabel, c.y, c.yLabel = "message size", timeAxis, "latency ("+latencyTitles[r.Test.LatencyOf]+")"
		for _, q := range []struct {
			name string
			of   func(*Latency) float64
		}{
			{"max", func(l *Latency) float64 { return l.Max }},
			{"p99.9", func(l *Latency) float64 { return l.P999 }},
			{"p99", func(l *Latency) float64 { return l.P99 }},
			{"p90", func(l *Latency) float64 { return l.P90 }},
			{"p50", func(l *Latency) float64 { return l.P50 }},
		} {
			s := series{name: q.name, faint: q.name == "max"}
			for _, x := range done {
				if x.Latency != nil {
					s.points = append(s.points, point{float64(x.Size), q.of(x.Latency)})
				}
			}
			c.series = append(c.series, s)
		}
	case r.Test.Kind == BW:
		c.xLabel, c.y, c.yLabel = "message size", bandwidthAxis, "payload bandwidth"
		s := series{name: "bandwidth"}
		for _, x := range done {
			s.points = append(s.points, point{float64(x.Size), x.MegabytesPerSecond})
		}
		c.series = []series{s}
	default:
		c.xLabel, c.y, c.yLabel = "message size", rateAxis, "messages a second"
		s := series{name: "messages/s"}
		for _, x := range done {
			s.points = append(s.points, point{float64(x.Size), x.MessagesPerSecond})
		}
		c.series = []series{s}
	}
	return c
}

// A chart is a line chart with logarithmic axes.
type chart struct {
	title, subtitle string
	xLabel, yLabel  string
	x, y            axis
	series          []series // drawn and named from top to bottom
}

type series struct {
	name   string
	faint  bool
	points []point // by ascending x
}

type point struct{ x, y float64 }

// An axis knows where its ticks may be and how values are written.
type axis struct {
	ticks func(lo, hi float64) []float64 // ascending, first <= lo and last >= hi
	text  func(v float64) string
}

var (
	bytesAxis      = axis{ticks: powerTicks, text: bytesText}
	percentileAxis = axis{ticks: func(_, hi float64) []float64 { return decadeTicks(1, max(hi, 10), 1) }, text: percentileText}
	timeAxis       = axis{ticks: niceTicks, text: timeText}
	bandwidthAxis  = axis{ticks: niceTicks, text: func(v float64) string { return unitText(v*1e6, "B/s") }}
	rateAxis       = axis{ticks: niceTicks, text: func(v float64) string { return unitText(v, "/s") }}
)

// powerTicks are powers of two around [lo, hi].
func powerTicks(lo, hi float64) []float64 {
	var t []float64
	a, b := math.Floor(math.Log2(lo)), math.Ceil(math.Log2(hi))
	if a == b {
		a, b = a-1, b+1
	}
	for e := a; e <= b; e++ {
		t = append(t, math.Exp2(e))
	}
	return t
}

// niceTicks are 1, 2 and 5 times powers of ten around [lo, hi]; only powers of ten where those are many.
func niceTicks(lo, hi float64) []float64 {
	if math.Log10(hi/lo) > 4 {
		return decadeTicks(lo, hi, 1)
	}
	return decadeTicks(lo, hi, 1, 2, 5)
}

func decadeTicks(lo, hi float64, steps ...float64) []float64 {
	var t []float64
	for e := math.Floor(math.Log10(lo)) - 1; e <= math.Ceil(math.Log10(hi))+1; e++ {
		for _, s := range steps {
			t = append(t, s*math.Pow(10, e))
		}
	}
	const eps = 1e-9 // of rounding in Pow and Log10
	first, last := 0, len(t)-1
	for first+1 < len(t) && t[first+1] <= lo*(1+eps) {
		first++
	}
	for last > first+1 && t[last-1] >= hi*(1-eps) {
		last--
	}
	return t[first : last+1]
}

func bytesText(v float64) string {
	switch {
	case v >= 1<<30:
		return fmt.Sprintf("%g GiB", v/(1<<30))
	case v >= 1<<20:
		return fmt.Sprintf("%g MiB", v/(1<<20))
	case v >= 1<<10:
		return fmt.Sprintf("%g KiB", v/(1<<10))
	}
	return fmt.Sprintf("%g", v)
}

// percentileText writes v = 1/(1-p).
func percentileText(v float64) string {
	if v <= 1 {
		return "0 %"
	}
	return fmt.Sprintf("%.*f %%", max(0, int(math.Round(math.Log10(v)))-2), 100-100/v)
}

func timeText(ns float64) string {
	switch {
	case ns >= 1e9*(1-1e-9):
		return fmt.Sprintf("%.4g s", ns/1e9)
	case ns >= 1e6*(1-1e-9):
		return fmt.Sprintf("%.4g ms", ns/1e6)
	case ns >= 1e3*(1-1e-9):
		return fmt.Sprintf("%.4g µs", ns/1e3)
	}
	return fmt.Sprintf("%.4g ns", ns)
}

func unitText(v float64, unit string) string {
	for _, p := range []struct {
		f float64
		s string
	}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if v >= p.f*(1-1e-9) {
			return fmt.Sprintf("%.4g %s%s", v/p.f, p.s, unit)
		}
	}
	return fmt.Sprintf("%.4g %s", v, unit)
}

// The picture's measures, in pixels.
const (
	chartW, chartH       = 900, 480
	plotL, plotR         = 92, 760 // what is right of it belongs to the names of the lines
	plotT, plotB         = 78, 412
	minTickX, minTickY   = 56, 16 // closer ticks lose their text
	nameGap              = 15     // between the names of lines
	chartFont            = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
	inkDark, inkMid      = "#1a1a1a", "#555555"
	inkGrid, inkBackdrop = "#e3e3e3", "#ffffff"
)

// chartColors can be told apart with any kind of colour vision (Okabe and Ito's palette).
var chartColors = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"}

// scale maps a value to a pixel, logarithmically.
type scale struct{ v0, v1, p0, p1 float64 }

func (s scale) at(v float64) float64 {
	return s.p0 + (s.p1-s.p0)*(math.Log(v)-math.Log(s.v0))/(math.Log(s.v1)-math.Log(s.v0))
}

// thin returns which ticks get text: every n-th, so that texts are at least gap pixels apart.
func (s scale) thin(ticks []float64, gap float64) int {
	if len(ticks) < 2 {
		return 1
	}
	for n := 1; ; n++ {
		if n >= len(ticks) || math.Abs(s.at(ticks[n])-s.at(ticks[0])) >= gap {
			return n
		}
	}
}

func (c *chart) write(w io.Writer) error {
	lo, hi := point{math.Inf(1), math.Inf(1)}, point{math.Inf(-1), math.Inf(-1)}
	for i := range c.series {
		for j := range c.series[i].points {
			p := &c.series[i].points[j]
			p.y = max(p.y, 1e-3) // zero has no logarithm
			lo.x, lo.y, hi.x, hi.y = min(lo.x, p.x), min(lo.y, p.y), max(hi.x, p.x), max(hi.y, p.y)
		}
	}
	xt, yt := c.x.ticks(lo.x, hi.x), c.y.ticks(lo.y, hi.y)
	sx := scale{xt[0], xt[len(xt)-1], plotL, plotR}
	sy := scale{yt[0], yt[len(yt)-1], plotB, plotT}

	var b strings.Builder
	out := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	text := func(x, y float64, anchor, fill string, size int, more, s string) {
		out(`<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s" font-size="%d"%s>%s</text>`, x, y, anchor, fill, size, more, escape(s))
	}
	out(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="%s" role="img">`, chartW, chartH, chartW, chartH, chartFont)
	out(`<title>%s</title>`, escape(c.title))
	out(`<desc>%s</desc>`, escape(c.subtitle))
	out(`<rect width="%d" height="%d" fill="%s"/>`, chartW, chartH, inkBackdrop)
	text(plotL, 28, "start", inkDark, 17, ` font-weight="600"`, c.title)
	for i, line := range wrap(c.subtitle, 124, 2) {
		text(plotL, 46+14*float64(i), "start", inkMid, 11, "", line)
	}

	every := sx.thin(xt, minTickX)
	for i, v := range xt {
		x := sx.at(v)
		out(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>`, x, plotT, x, plotB, inkGrid)
		if i%every == 0 {
			text(x, plotB+18, "middle", inkMid, 12, "", c.x.text(v))
		}
	}
	every = sy.thin(yt, minTickY)
	for i, v := range yt {
		y := sy.at(v)
		out(`<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="%s"/>`, plotL, y, plotR, y, inkGrid)
		if i%every == 0 {
			text(plotL-8, y+4, "end", inkMid, 12, "", c.y.text(v))
		}
	}
	out(`<path d="M%d %dV%dH%d" fill="none" stroke="%s"/>`, plotL, plotT, plotB, plotR, inkMid)
	text((plotL+plotR)/2, plotB+42, "middle", inkDark, 13, "", c.xLabel)
	text(22, (plotT+plotB)/2, "middle", inkDark, 13, fmt.Sprintf(` transform="rotate(-90 22 %d)"`, (plotT+plotB)/2), c.yLabel)

	names := c.nameHeights(sy)
	for i, s := range c.series {
		if len(s.points) == 0 {
			continue
		}
		color, extra := chartColors[i%len(chartColors)], ""
		if s.faint {
			extra = ` stroke-dasharray="2 4" opacity="0.75"`
		}
		var d strings.Builder
		for j, p := range s.points {
			cmd := 'L'
			if j == 0 {
				cmd = 'M'
			}
			fmt.Fprintf(&d, "%c%.1f %.1f", cmd, sx.at(p.x), sy.at(p.y))
		}
		out(`<path d="%s" fill="none" stroke="%s" stroke-width="2" stroke-linejoin="round"%s/>`, d.String(), color, extra)
		for _, p := range s.points {
			out(`<circle cx="%.1f" cy="%.1f" r="3" fill="%s"><title>%s</title></circle>`, sx.at(p.x), sy.at(p.y), color,
				escape(fmt.Sprintf("%s, %s: %s", s.name, c.x.text(p.x), c.y.text(p.y))))
		}
		if len(c.series) > 1 {
			last := s.points[len(s.points)-1]
			out(`<path d="M%.1f %.1fL%d %.1f" stroke="%s" opacity="0.5"/>`, sx.at(last.x)+4, sy.at(last.y), plotR+8, names[i], color)
			text(plotR+11, names[i]+4, "start", color, 12, ` font-weight="600"`, s.name+"  "+c.y.text(last.y))
		}
	}
	out(`</svg>`)
	_, err := io.WriteString(w, b.String())
	return err
}

// nameHeights spreads the lines' names, which stand at their last points, so that none covers another.
func (c *chart) nameHeights(sy scale) []float64 {
	h := make([]float64, len(c.series))
	var order []int
	for i, s := range c.series {
		if len(s.points) > 0 {
			h[i] = sy.at(s.points[len(s.points)-1].y)
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		switch {
		case h[a] < h[b]:
			return -1
		case h[a] > h[b]:
			return 1
		}
		return 0
	})
	for k := 1; k < len(order); k++ {
		h[order[k]] = max(h[order[k]], h[order[k-1]]+nameGap)
	}
	if len(order) > 0 { // push back up what fell off the bottom
		limit := float64(plotB)
		for _, i := range slices.Backward(order) {
			h[i] = min(h[i], limit)
			limit = h[i] - nameGap
		}
	}
	return h
}

// wrap breaks s at spaces into at most lines lines of about width characters.
func wrap(s string, width, lines int) []string {
	var out []string
	for len(out) < lines-1 && len(s) > width {
		i := strings.LastIndexByte(s[:width], ' ')
		if i <= 0 {
			break
		}
		out = append(out, s[:i])
		s = s[i+1:]
	}
	return append(out, s)
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}
