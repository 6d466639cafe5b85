// Behaviour of the ECP5 blocks that Yosys knows only as black boxes, as far as its mapping and ours use them; for the
// other cells, Yosys' own models. For simulation of netlists, not for synthesis. Asking a block for more is fatal.

`include "common_sim.vh"
`include "ccu2c_sim.vh"

// Block RAM of 16 Kbit and 2 Kbit of parity: 2048 groups of 9 bits, of which ports of 4, 2 and 1 bits use the lower 8.
// A port of 18 bits takes two groups and byte enables from address bits 0 and 1; one of 36 bits four groups and four
// enables, with the upper half of its word on the pins of the other port, whose output register then is in the same mode.
//
// Bits that one port reads at the edge at which the other writes them are undefined on silicon. Here they come out
// inverted, so that whoever uses them computes something else.
module DP16KD (
    input wire DIA17, DIA16, DIA15, DIA14, DIA13, DIA12, DIA11, DIA10, DIA9, DIA8, DIA7, DIA6, DIA5, DIA4, DIA3, DIA2,
    DIA1, DIA0,
    input wire ADA13, ADA12, ADA11, ADA10, ADA9, ADA8, ADA7, ADA6, ADA5, ADA4, ADA3, ADA2, ADA1, ADA0,
    input wire CEA, OCEA, CLKA, WEA, RSTA, CSA2, CSA1, CSA0,
    output wire DOA17, DOA16, DOA15, DOA14, DOA13, DOA12, DOA11, DOA10, DOA9, DOA8, DOA7, DOA6, DOA5, DOA4, DOA3,
    DOA2, DOA1, DOA0,
    input wire DIB17, DIB16, DIB15, DIB14, DIB13, DIB12, DIB11, DIB10, DIB9, DIB8, DIB7, DIB6, DIB5, DIB4, DIB3, DIB2,
    DIB1, DIB0,
    input wire ADB13, ADB12, ADB11, ADB10, ADB9, ADB8, ADB7, ADB6, ADB5, ADB4, ADB3, ADB2, ADB1, ADB0,
    input wire CEB, OCEB, CLKB, WEB, RSTB, CSB2, CSB1, CSB0,
    output wire DOB17, DOB16, DOB15, DOB14, DOB13, DOB12, DOB11, DOB10, DOB9, DOB8, DOB7, DOB6, DOB5, DOB4, DOB3,
    DOB2, DOB1, DOB0
);
    parameter DATA_WIDTH_A = 18;
    parameter DATA_WIDTH_B = 18;
    parameter REGMODE_A = "NOREG";
    parameter REGMODE_B = "NOREG";
    parameter RESETMODE = "SYNC";
    parameter ASYNC_RESET_RELEASE = "SYNC";
    parameter CSDECODE_A = "0b000";
    parameter CSDECODE_B = "0b000";
    parameter WRITEMODE_A = "NORMAL";
    parameter WRITEMODE_B = "NORMAL";
    parameter CLKAMUX = "CLKA";
    parameter CLKBMUX = "CLKB";
    parameter GSR = "ENABLED";
    parameter [319:0] INITVAL_00 = 320'd0;
    parameter [319:0] INITVAL_01 = 320'd0;
    parameter [319:0] INITVAL_02 = 320'd0;
    parameter [319:0] INITVAL_03 = 320'd0;
    parameter [319:0] INITVAL_04 = 320'd0;
    parameter [319:0] INITVAL_05 = 320'd0;
    parameter [319:0] INITVAL_06 = 320'd0;
    parameter [319:0] INITVAL_07 = 320'd0;
    parameter [319:0] INITVAL_08 = 320'd0;
    parameter [319:0] INITVAL_09 = 320'd0;
    parameter [319:0] INITVAL_0A = 320'd0;
    parameter [319:0] INITVAL_0B = 320'd0;
    parameter [319:0] INITVAL_0C = 320'd0;
    parameter [319:0] INITVAL_0D = 320'd0;
    parameter [319:0] INITVAL_0E = 320'd0;
    parameter [319:0] INITVAL_0F = 320'd0;
    parameter [319:0] INITVAL_10 = 320'd0;
    parameter [319:0] INITVAL_11 = 320'd0;
    parameter [319:0] INITVAL_12 = 320'd0;
    parameter [319:0] INITVAL_13 = 320'd0;
    parameter [319:0] INITVAL_14 = 320'd0;
    parameter [319:0] INITVAL_15 = 320'd0;
    parameter [319:0] INITVAL_16 = 320'd0;
    parameter [319:0] INITVAL_17 = 320'd0;
    parameter [319:0] INITVAL_18 = 320'd0;
    parameter [319:0] INITVAL_19 = 320'd0;
    parameter [319:0] INITVAL_1A = 320'd0;
    parameter [319:0] INITVAL_1B = 320'd0;
    parameter [319:0] INITVAL_1C = 320'd0;
    parameter [319:0] INITVAL_1D = 320'd0;
    parameter [319:0] INITVAL_1E = 320'd0;
    parameter [319:0] INITVAL_1F = 320'd0;
    parameter [319:0] INITVAL_20 = 320'd0;
    parameter [319:0] INITVAL_21 = 320'd0;
    parameter [319:0] INITVAL_22 = 320'd0;
    parameter [319:0] INITVAL_23 = 320'd0;
    parameter [319:0] INITVAL_24 = 320'd0;
    parameter [319:0] INITVAL_25 = 320'd0;
    parameter [319:0] INITVAL_26 = 320'd0;
    parameter [319:0] INITVAL_27 = 320'd0;
    parameter [319:0] INITVAL_28 = 320'd0;
    parameter [319:0] INITVAL_29 = 320'd0;
    parameter [319:0] INITVAL_2A = 320'd0;
    parameter [319:0] INITVAL_2B = 320'd0;
    parameter [319:0] INITVAL_2C = 320'd0;
    parameter [319:0] INITVAL_2D = 320'd0;
    parameter [319:0] INITVAL_2E = 320'd0;
    parameter [319:0] INITVAL_2F = 320'd0;
    parameter [319:0] INITVAL_30 = 320'd0;
    parameter [319:0] INITVAL_31 = 320'd0;
    parameter [319:0] INITVAL_32 = 320'd0;
    parameter [319:0] INITVAL_33 = 320'd0;
    parameter [319:0] INITVAL_34 = 320'd0;
    parameter [319:0] INITVAL_35 = 320'd0;
    parameter [319:0] INITVAL_36 = 320'd0;
    parameter [319:0] INITVAL_37 = 320'd0;
    parameter [319:0] INITVAL_38 = 320'd0;
    parameter [319:0] INITVAL_39 = 320'd0;
    parameter [319:0] INITVAL_3A = 320'd0;
    parameter [319:0] INITVAL_3B = 320'd0;
    parameter [319:0] INITVAL_3C = 320'd0;
    parameter [319:0] INITVAL_3D = 320'd0;
    parameter [319:0] INITVAL_3E = 320'd0;
    parameter [319:0] INITVAL_3F = 320'd0;

    wire [13:0] address_a = {ADA13, ADA12, ADA11, ADA10, ADA9, ADA8, ADA7, ADA6, ADA5, ADA4, ADA3, ADA2, ADA1, ADA0};
    wire [17:0] data_a = {DIA17, DIA16, DIA15, DIA14, DIA13, DIA12, DIA11, DIA10, DIA9, DIA8, DIA7, DIA6, DIA5, DIA4,
    DIA3, DIA2, DIA1, DIA0};
    wire [13:0] address_b = {ADB13, ADB12, ADB11, ADB10, ADB9, ADB8, ADB7, ADB6, ADB5, ADB4, ADB3, ADB2, ADB1, ADB0};
    wire [17:0] data_b = {DIB17, DIB16, DIB15, DIB14, DIB13, DIB12, DIB11, DIB10, DIB9, DIB8, DIB7, DIB6, DIB5, DIB4,
    DIB3, DIB2, DIB1, DIB0};
    localparam [64*320-1:0] CONTENTS = {INITVAL_3F, INITVAL_3E, INITVAL_3D, INITVAL_3C, INITVAL_3B, INITVAL_3A,
    INITVAL_39, INITVAL_38, INITVAL_37, INITVAL_36, INITVAL_35, INITVAL_34, INITVAL_33, INITVAL_32, INITVAL_31,
    INITVAL_30, INITVAL_2F, INITVAL_2E, INITVAL_2D, INITVAL_2C, INITVAL_2B, INITVAL_2A, INITVAL_29, INITVAL_28,
    INITVAL_27, INITVAL_26, INITVAL_25, INITVAL_24, INITVAL_23, INITVAL_22, INITVAL_21, INITVAL_20, INITVAL_1F,
    INITVAL_1E, INITVAL_1D, INITVAL_1C, INITVAL_1B, INITVAL_1A, INITVAL_19, INITVAL_18, INITVAL_17, INITVAL_16,
    INITVAL_15, INITVAL_14, INITVAL_13, INITVAL_12, INITVAL_11, INITVAL_10, INITVAL_0F, INITVAL_0E, INITVAL_0D,
    INITVAL_0C, INITVAL_0B, INITVAL_0A, INITVAL_09, INITVAL_08, INITVAL_07, INITVAL_06, INITVAL_05, INITVAL_04,
    INITVAL_03, INITVAL_02, INITVAL_01, INITVAL_00};

    function [10:0] first_group(input integer width, input [13:0] address);
        first_group = width == 36 ? {address[13:5], 2'b00} : width == 18 ? {address[13:4], 1'b0} : address[13:3];
    endfunction

    // The lowest bit of a group that a port uses.
    function [2:0] low_bit(input integer width, input [13:0] address);
        low_bit = width >= 9 ? 3'd0 : width == 4 ? {address[2], 2'b00} :
                  width == 2 ? {address[2:1], 1'b0} : address[2:0];
    endfunction

    function [8:0] used_bits(input integer width, input [13:0] address);
        used_bits = (width >= 9 ? 9'h1FF : width == 4 ? 9'h00F : width == 2 ? 9'h003 : 9'h001)
                    << low_bit(width, address);
    endfunction

    function [3:0] enables(input integer width, input [13:0] address);
        enables = width == 36 ? address[3:0] : width == 18 ? {2'b00, address[1:0]} : 4'b0001;
    endfunction

    reg [8:0] groups [0:2047];
    reg [35:0] word_a, word_b, out_a, out_b;
    wire [10:0] group_a = first_group(DATA_WIDTH_A, address_a);
    wire [10:0] group_b = first_group(DATA_WIDTH_B, address_b);
    wire [2:0] low_a = low_bit(DATA_WIDTH_A, address_a);
    wire [2:0] low_b = low_bit(DATA_WIDTH_B, address_b);
    wire [8:0] used_a = used_bits(DATA_WIDTH_A, address_a);
    wire [8:0] used_b = used_bits(DATA_WIDTH_B, address_b);
    wire [3:0] write_a = CEA && WEA ? enables(DATA_WIDTH_A, address_a) : 4'b0000;
    wire [3:0] write_b = CEB && WEB ? enables(DATA_WIDTH_B, address_b) : 4'b0000;
    wire [35:0] shifted_a = {data_b, data_a} << low_a;
    wire [35:0] shifted_b = {18'd0, data_b} << low_b;
    wire [3:0] ones_a = DATA_WIDTH_A == 36 ? 4'b1111 : DATA_WIDTH_A == 18 ? 4'b0011 : 4'b0001;
    wire [3:0] ones_b = DATA_WIDTH_B == 36 ? 4'b1111 : DATA_WIDTH_B == 18 ? 4'b0011 : 4'b0001;

    // A group as a port reads it while the other port writes `writes` from group `first` on.
    function [8:0] read_group(input [10:0] index, input [3:0] writes, input [10:0] first, input [8:0] used);
        integer k;
        begin
            read_group = groups[index];
            for (k = 0; k < 4; k = k + 1)
                if (writes[k] && first + k[10:0] == index) read_group = read_group ^ used;
        end
    endfunction

    integer n;
    initial begin
        for (n = 0; n < 2048; n = n + 1) groups[n] = CONTENTS[20*(n/2) + 9*(n%2) +: 9];
        word_a = 36'd0;
        word_b = 36'd0;
        out_a = 36'd0;
        out_b = 36'd0;
        if ((REGMODE_A != "NOREG" && REGMODE_A != "OUTREG") || (REGMODE_B != "NOREG" && REGMODE_B != "OUTREG") ||
            (DATA_WIDTH_B == 36 && REGMODE_A != REGMODE_B) || CSDECODE_A != "0b000" ||
            CSDECODE_B != "0b000" || CLKAMUX != "CLKA" || CLKBMUX != "CLKB")
            $fatal(1, "%m: this mode of DP16KD has no model");
    end

    integer la;
    always @(posedge CLKA) begin
        for (la = 0; la < 4; la = la + 1) begin
            if (write_a[la])
                groups[group_a + la[10:0]] <= (groups[group_a + la[10:0]] & ~used_a) | (shifted_a[9*la +: 9] & used_a);
            if (CEA && ones_a[la]) begin
                if (!WEA || WRITEMODE_A == "READBEFOREWRITE")
                    word_a[9*la +: 9] <=
                        (read_group(group_a + la[10:0], write_b, group_b, used_b) & used_a) >> low_a;
                else if (WRITEMODE_A == "WRITETHROUGH")
                    word_a[9*la +: 9] <= (shifted_a[9*la +: 9] & used_a) >> low_a;
            end
        end
        if (OCEA) out_a <= word_a;
        if (RSTA) begin
            if (RESETMODE != "SYNC") $fatal(1, "%m: the asynchronous reset of DP16KD has no model");
            if (REGMODE_A != "NOREG") $fatal(1, "%m: the reset of the output register of DP16KD has no model");
            word_a <= 36'd0;
        end
    end

    integer lb;
    always @(posedge CLKB) begin
        for (lb = 0; lb < 4; lb = lb + 1) begin
            if (write_b[lb])
                groups[group_b + lb[10:0]] <= (groups[group_b + lb[10:0]] & ~used_b) | (shifted_b[9*lb +: 9] & used_b);
            if (CEB && ones_b[lb]) begin
                if (!WEB || WRITEMODE_B == "READBEFOREWRITE")
                    word_b[9*lb +: 9] <=
                        (read_group(group_b + lb[10:0], write_a, group_a, used_a) & used_b) >> low_b;
                else if (WRITEMODE_B == "WRITETHROUGH")
                    word_b[9*lb +: 9] <= (shifted_b[9*lb +: 9] & used_b) >> low_b;
            end
        end
        if (OCEB) out_b <= word_b;
        if (RSTB) begin
            if (RESETMODE != "SYNC") $fatal(1, "%m: the asynchronous reset of DP16KD has no model");
            if (REGMODE_B != "NOREG") $fatal(1, "%m: the reset of the output register of DP16KD has no model");
            word_b <= 36'd0;
        end
    end

    wire [35:0] data_out_a = REGMODE_A == "OUTREG" ? out_a : word_a;
    wire [35:0] data_out_b = REGMODE_B == "OUTREG" ? out_b : word_b;
    assign {DOA17, DOA16, DOA15, DOA14, DOA13, DOA12, DOA11, DOA10, DOA9, DOA8, DOA7, DOA6, DOA5, DOA4, DOA3, DOA2,
    DOA1, DOA0} = DATA_WIDTH_B == 36 ? data_out_b[17:0] : data_out_a[17:0];
    assign {DOB17, DOB16, DOB15, DOB14, DOB13, DOB12, DOB11, DOB10, DOB9, DOB8, DOB7, DOB6, DOB5, DOB4, DOB3, DOB2,
    DOB1, DOB0} = DATA_WIDTH_B == 36 ? data_out_b[35:18] : data_out_b[17:0];
endmodule

// Multiplier of 18 x 18 bits, each signed or not, with registers at its inputs and its output where they are asked for.
module MULT18X18D (
    input wire A17, A16, A15, A14, A13, A12, A11, A10, A9, A8, A7, A6, A5, A4, A3, A2, A1, A0,
    input wire B17, B16, B15, B14, B13, B12, B11, B10, B9, B8, B7, B6, B5, B4, B3, B2, B1, B0,
    input wire C17, C16, C15, C14, C13, C12, C11, C10, C9, C8, C7, C6, C5, C4, C3, C2, C1, C0,
    input wire SIGNEDA, SIGNEDB, SOURCEA, SOURCEB, CLK3, CLK2, CLK1, CLK0, CE3, CE2, CE1, CE0, RST3, RST2, RST1, RST0,
    input wire SRIA17, SRIA16, SRIA15, SRIA14, SRIA13, SRIA12, SRIA11, SRIA10, SRIA9, SRIA8, SRIA7, SRIA6, SRIA5,
    SRIA4, SRIA3, SRIA2, SRIA1, SRIA0,
    input wire SRIB17, SRIB16, SRIB15, SRIB14, SRIB13, SRIB12, SRIB11, SRIB10, SRIB9, SRIB8, SRIB7, SRIB6, SRIB5,
    SRIB4, SRIB3, SRIB2, SRIB1, SRIB0,
    output wire SROA17, SROA16, SROA15, SROA14, SROA13, SROA12, SROA11, SROA10, SROA9, SROA8, SROA7, SROA6, SROA5,
    SROA4, SROA3, SROA2, SROA1, SROA0,
    output wire SROB17, SROB16, SROB15, SROB14, SROB13, SROB12, SROB11, SROB10, SROB9, SROB8, SROB7, SROB6, SROB5,
    SROB4, SROB3, SROB2, SROB1, SROB0,
    output wire ROA17, ROA16, ROA15, ROA14, ROA13, ROA12, ROA11, ROA10, ROA9, ROA8, ROA7, ROA6, ROA5, ROA4, ROA3,
    ROA2, ROA1, ROA0,
    output wire ROB17, ROB16, ROB15, ROB14, ROB13, ROB12, ROB11, ROB10, ROB9, ROB8, ROB7, ROB6, ROB5, ROB4, ROB3,
    ROB2, ROB1, ROB0,
    output wire ROC17, ROC16, ROC15, ROC14, ROC13, ROC12, ROC11, ROC10, ROC9, ROC8, ROC7, ROC6, ROC5, ROC4, ROC3,
    ROC2, ROC1, ROC0,
    output wire P35, P34, P33, P32, P31, P30, P29, P28, P27, P26, P25, P24, P23, P22, P21, P20, P19, P18, P17, P16,
    P15, P14, P13, P12, P11, P10, P9, P8, P7, P6, P5, P4, P3, P2, P1, P0, SIGNEDP
);
    parameter REG_INPUTA_CLK = "NONE";
    parameter REG_INPUTA_CE = "CE0";
    parameter REG_INPUTA_RST = "RST0";
    parameter REG_INPUTB_CLK = "NONE";
    parameter REG_INPUTB_CE = "CE0";
    parameter REG_INPUTB_RST = "RST0";
    parameter REG_INPUTC_CLK = "NONE";
    parameter REG_INPUTC_CE = "CE0";
    parameter REG_INPUTC_RST = "RST0";
    parameter REG_PIPELINE_CLK = "NONE";
    parameter REG_PIPELINE_CE = "CE0";
    parameter REG_PIPELINE_RST = "RST0";
    parameter REG_OUTPUT_CLK = "NONE";
    parameter REG_OUTPUT_CE = "CE0";
    parameter REG_OUTPUT_RST = "RST0";
    parameter CLK0_DIV = "ENABLED";
    parameter CLK1_DIV = "ENABLED";
    parameter CLK2_DIV = "ENABLED";
    parameter CLK3_DIV = "ENABLED";
    parameter HIGHSPEED_CLK = "NONE";
    parameter GSR = "ENABLED";
    parameter CAS_MATCH_REG = "FALSE";
    parameter SOURCEB_MODE = "B_SHIFT";
    parameter MULT_BYPASS = "DISABLED";
    parameter RESETMODE = "SYNC";

    wire [17:0] a = {A17, A16, A15, A14, A13, A12, A11, A10, A9, A8, A7, A6, A5, A4, A3, A2, A1, A0};
    wire [17:0] b = {B17, B16, B15, B14, B13, B12, B11, B10, B9, B8, B7, B6, B5, B4, B3, B2, B1, B0};
    wire [3:0] ce = {CE3, CE2, CE1, CE0};
    wire [3:0] reset = {RST3, RST2, RST1, RST0};

    function [1:0] which(input [31:0] name);
        which = name[1:0];
    endfunction

    reg [17:0] a_register, b_register;
    reg signed_a_register, signed_b_register;
    reg [35:0] p_register;
    wire a_here = REG_INPUTA_CLK == "NONE";
    wire b_here = REG_INPUTB_CLK == "NONE";
    wire sign_a = SIGNEDA & A17;
    wire sign_b = SIGNEDB & B17;
    wire signed [18:0] factor_a = a_here ? {sign_a, a} : {signed_a_register & a_register[17], a_register};
    wire signed [18:0] factor_b = b_here ? {sign_b, b} : {signed_b_register & b_register[17], b_register};
    wire signed [37:0] product = factor_a * factor_b;

    initial begin
        a_register = 18'd0;
        b_register = 18'd0;
        signed_a_register = 1'b0;
        signed_b_register = 1'b0;
        p_register = 36'd0;
        if ((REG_INPUTA_CLK != "NONE" && REG_INPUTA_CLK != "CLK0") ||
            (REG_INPUTB_CLK != "NONE" && REG_INPUTB_CLK != "CLK0") ||
            (REG_OUTPUT_CLK != "NONE" && REG_OUTPUT_CLK != "CLK0") ||
            REG_PIPELINE_CLK != "NONE" || MULT_BYPASS != "DISABLED" || RESETMODE != "SYNC")
            $fatal(1, "%m: this mode of MULT18X18D has no model");
    end

    always @(posedge CLK0) begin
        if (SOURCEA || SOURCEB) $fatal(1, "%m: this mode of MULT18X18D has no model");
        if (ce[which(REG_INPUTA_CE)]) {signed_a_register, a_register} <= {SIGNEDA, a};
        if (ce[which(REG_INPUTB_CE)]) {signed_b_register, b_register} <= {SIGNEDB, b};
        if (ce[which(REG_OUTPUT_CE)]) p_register <= product[35:0];
        if (reset[which(REG_INPUTA_RST)]) {signed_a_register, a_register} <= 19'd0;
        if (reset[which(REG_INPUTB_RST)]) {signed_b_register, b_register} <= 19'd0;
        if (reset[which(REG_OUTPUT_RST)]) p_register <= 36'd0;
    end

    assign {P35, P34, P33, P32, P31, P30, P29, P28, P27, P26, P25, P24, P23, P22, P21, P20, P19, P18, P17, P16, P15,
    P14, P13, P12, P11, P10, P9, P8, P7, P6, P5, P4, P3, P2, P1,
    P0} = REG_OUTPUT_CLK == "NONE" ? product[35:0] : p_register;
endmodule
